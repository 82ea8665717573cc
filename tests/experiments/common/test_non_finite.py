"""Steps that are not finite: withheld bit for bit, named, saved and loaded, or skipped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.common.non_finite import (
    CULPRIT,
    NonFinite,
    culprit,
    guard,
    guarded,
    load_non_finite,
    save_non_finite,
    skip_non_finite,
    skips_non_finite,
)


def start():
    return {
        "best": jnp.asarray(jnp.inf),
        "count": jnp.asarray(0),
        "key": jax.random.key(3),
        "weight": jnp.arange(1.0, 5.0),
    }


def update(state, batch):
    key, draw = jax.random.split(state["key"])
    weight = state["weight"] * batch["factor"] + 1e-3 * jax.random.normal(draw, (4,))
    new = {"best": state["best"], "count": state["count"] + 1, "key": key, "weight": weight}
    return new, {"loss": batch["loss"], "accuracy": jnp.ones(())}


def batch(loss=1.0, factor=1.0):
    return {"loss": jnp.float32(loss), "factor": jnp.float32(factor)}


def assert_same(left, right):
    for name in left:
        one, other = left[name], right[name]
        if name == "key":
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


BAD = {"loss": batch(loss=np.nan), "state.weight": batch(factor=np.inf)}


def test_finite_steps_are_those_of_the_update():
    step = jax.jit(guarded(update, skip=False))
    plain = jax.jit(update)
    state, expected = guard(start()), start()
    for factor in (0.5, 2.0, 1.5):
        state, metrics = step(state, batch(factor=factor))
        expected, _ = plain(expected, batch(factor=factor))
        assert metrics[CULPRIT] == -1
    assert_same(state.state, expected)


@pytest.mark.parametrize("name", BAD)
def test_a_step_that_is_not_finite_leaves_no_trace_and_is_named(name):
    step = jax.jit(guarded(update, skip=False), donate_argnums=0)
    state, _ = step(guard(start()), batch(factor=0.5))
    good = jax.tree.map(jnp.copy, state.state)
    state, metrics = step(state, BAD[name])
    assert culprit(int(metrics[CULPRIT]), metrics, good) == name
    state, metrics = step(state, batch())  # one more is under way before the host knows
    assert metrics[CULPRIT] == -1
    assert_same(state.state, good)


@pytest.mark.parametrize("name", BAD)
def test_skipping_goes_on_from_the_state_before_with_new_random_numbers(name):
    step = jax.jit(guarded(update, skip=True), donate_argnums=0)
    state, metrics = step(guard(start()), BAD[name])
    assert culprit(int(metrics[CULPRIT]), metrics, start()) == name
    key, _ = jax.random.split(start()["key"])
    expected = start() | {"key": key}
    assert_same(state.state, expected)
    state, metrics = step(state, batch(factor=2.0))
    assert_same(state.state, jax.jit(update)(expected, batch(factor=2.0))[0])


def test_what_a_step_was_given_is_loaded_again(tmp_path):
    found = NonFinite(7, start(), BAD["loss"], "loss")
    for _ in range(2):  # a resumed run meets it again
        save_non_finite(tmp_path / "non_finite", found)
    loaded = load_non_finite(tmp_path / "non_finite", start(), batch())
    assert (loaded.step, loaded.culprit) == (7, "loss")
    assert_same(loaded.state, found.state)
    assert np.isnan(jax.jit(update)(loaded.state, loaded.batch)[1]["loss"])
    with pytest.raises(UserError, match="holds no step"):
        load_non_finite(tmp_path / "nothing", start(), batch())


def test_the_choice_is_that_of_the_block():
    assert not skips_non_finite()
    with skip_non_finite(True):
        assert skips_non_finite()
    assert not skips_non_finite()
