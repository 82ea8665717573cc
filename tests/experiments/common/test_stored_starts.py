"""Warm starts as part of a training state: they survive its checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.checkpoints import CheckpointWriter, restore_newest
from jdeq import AugmentedState
from jdeq.joint import starts
from jdeq.solution import Result, Solution


def training_state():
    like = AugmentedState(jnp.zeros((1, 3)), jnp.zeros((1, 2)), jnp.zeros((1, 3)))
    store = starts.init(like, 6, keep=("x", "mu"), dtype=jnp.bfloat16)
    return {"params": jnp.ones(4), "starts": store}


def test_round_trip(tmp_path):
    state = training_state()
    value = AugmentedState(jnp.ones((2, 3)), jnp.array([[1.0, 2], [3, 4]]), 5 * jnp.ones((2, 3)))
    codes = jnp.full((2,), Result.converged, jnp.int32)
    solution = Solution(value, codes, codes, jnp.zeros(2))
    state["starts"] = starts.update(state["starts"], jnp.array([5, 1]), solution)
    writer = CheckpointWriter(tmp_path)
    writer.save(1, state, {})
    writer.close()

    restored = restore_newest(tmp_path, jax.eval_shape(training_state), discard=False).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert restored["starts"].state.x.dtype == jnp.bfloat16
    cold = jax.tree.map(jnp.zeros_like, value)
    got = starts.lookup(restored["starts"], jnp.array([1, 0]), cold)
    np.testing.assert_array_equal(got.x, [[3, 4], [0, 0]])
