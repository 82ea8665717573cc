"""Checkpoints: exact round trips, background saves, full disks, damage and killed saves."""

from __future__ import annotations

import resource
import shutil
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import checkpoints
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
        assert f"{copy / '4'} is damaged" in message
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


@pytest.fixture
def held_up(monkeypatch):
    """Keeps saves from their end until it is set."""
    go_on = threading.Event()

    def publish(directory, step):
        assert go_on.wait(60)
        real(directory, step)

    real = checkpoints.publish
    monkeypatch.setattr(checkpoints, "publish", publish)
    yield go_on
    go_on.set()


def test_a_save_goes_on_in_the_background_and_is_valid_only_at_its_end(saved, held_up):
    writer = CheckpointWriter(saved)
    writer.save(5, state(5), {})
    writer.check()
    assert saved_steps(saved) == [2, 3, 4]
    assert restore_newest(saved, state(0), discard=False).step == 4
    held_up.set()
    writer.close()
    assert saved_steps(saved) == [3, 4, 5]


def test_a_killed_save_is_no_checkpoint_and_is_cleared_away(saved, tmp_path, held_up):
    writer = CheckpointWriter(saved)
    writer.save(5, state(5), {})
    while not (saved / "saving-5").exists():
        pass
    killed = tmp_path / "killed"
    shutil.copytree(saved, killed)
    (killed / "3").rename(killed / "removing-3")
    (killed / "removing-3" / "checksums.json").unlink()
    assert restore_newest(killed, state(0), discard=True).step == 4
    again = CheckpointWriter(killed)
    again.save(5, state(50), {})
    held_up.set()
    again.close()
    writer.close()
    assert sorted(entry.name for entry in killed.iterdir()) == ["2", "4", "5"]
    assert_same(restore_newest(killed, state(0), discard=False).state, state(50))


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def step(values):
        return values + 1

    writer = CheckpointWriter(tmp_path)
    values = step(jnp.zeros((512, 1024)))
    for number in range(1, 16):
        if number % 5 == 0:
            writer.save(number, values, {})
        values = step(values)
    writer.close()
    for number in (5, 10, 15):
        copy = tmp_path.with_name(f"only{number}")
        shutil.copytree(tmp_path / str(number), copy / str(number))
        restored = restore_newest(copy, values, discard=False)
        np.testing.assert_array_equal(restored.state, np.full((512, 1024), number, np.float32))


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 64 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("finish", [CheckpointWriter.close, CheckpointWriter.wait])
def test_a_save_that_does_not_fit_is_one_sentence_and_harms_nothing(saved, small_files, finish):
    writer = CheckpointWriter(saved)
    big = jax.random.normal(jax.random.key(0), (512, 512))
    writer.save(5, big, {})
    with pytest.raises(
        UserError, match=r"step 5 cannot be written .*File too large.* of step 4"
    ) as e:
        finish(writer)
    assert "\n" not in str(e.value)
    assert sorted(entry.name for entry in saved.iterdir()) == ["2", "3", "4"]
    assert_same(restore_newest(saved, state(0), discard=False).state, state(4))


def test_a_full_disk_while_the_checkpoint_is_made_valid_is_noticed_by_check(saved, monkeypatch):
    def publish(directory, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "publish", publish)
    writer = CheckpointWriter(saved)
    writer.save(5, state(5), {})

    def go_on_training():
        while True:
            writer.check()

    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        go_on_training()
    monkeypatch.undo()
    writer.save(5, state(5), {})
    writer.close()
    assert saved_steps(saved) == [3, 4, 5]
