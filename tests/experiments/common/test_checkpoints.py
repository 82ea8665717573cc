"""Checkpoints: exact round trips, damage noticed and stepped over, killed saves."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.checkpoints import CheckpointWriter, restore_newest, saved_steps
from experiments.common.errors import UserError


def state(step):
    params = {"layer": {"kernel": jnp.arange(12.0).reshape(3, 4) + step}, "list": [jnp.ones(2)]}
    memory = optax.adam(optax.cosine_decay_schedule(1e-3, 10)).init(params)
    return params, memory, jax.random.key(step), jnp.asarray(step, jnp.int32)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "checkpoints"
    writer = CheckpointWriter(directory)
    for step in (1, 2, 3, 4):
        writer.save(step, state(step), {"position": {"next_index": 10 * step}})
    writer.close()
    return directory


def test_the_newest_is_restored_exactly_and_three_are_kept(saved):
    restored = restore_newest(saved, jax.eval_shape(lambda: state(0)), discard=False)
    assert restored.step == 4
    assert restored.notes == {"position": {"next_index": 40}}
    assert_same(restored.state, state(4))
    assert sorted(saved_steps(saved)) == [2, 3, 4]


def test_nothing_saved_is_no_error(tmp_path):
    assert restore_newest(tmp_path / "none", state(0), discard=True) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink()])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_used(saved, tmp_path, capsys, damage):
    files = [path for path in (saved / "4").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    for path in files:
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        damage(copy / path.relative_to(saved))
        restored = restore_newest(copy, state(0), discard=False)
        assert restored.step == 3
        assert_same(restored.state, state(3))
        message = capsys.readouterr().err
        assert f"{copy / '4'} is damaged or incomplete" in message
        assert "using the checkpoint before: step 3" in message
        shutil.rmtree(copy)


def test_training_saves_a_discarded_step_again(saved):
    truncate(next((saved / "4" / "state").rglob("manifest.ocdbt")))
    restore_newest(saved, state(0), discard=True)
    assert sorted(saved_steps(saved)) == [2, 3]
    writer = CheckpointWriter(saved)
    writer.save(4, state(40), {})
    writer.close()
    assert_same(restore_newest(saved, state(0), discard=False).state, state(40))


def test_if_all_are_damaged_nothing_is_deleted(saved):
    for step in (2, 3, 4):
        (saved / str(step) / "checksums.json").unlink()
    with pytest.raises(UserError, match="all checkpoints"):
        restore_newest(saved, state(0), discard=True)
    assert sorted(saved_steps(saved)) == [2, 3, 4]


def test_another_model_is_refused(saved):
    params, *rest = state(0)
    with pytest.raises(UserError, match=r"0\.extra"):
        restore_newest(saved, (params | {"extra": jnp.ones(1)}, *rest), discard=False)
    params["layer"]["kernel"] = jnp.ones((3, 5))
    with pytest.raises(UserError, match=r"0\.layer\.kernel.*\[3, 4\].*\[3, 5\]"):
        restore_newest(saved, (params, *rest), discard=False)
