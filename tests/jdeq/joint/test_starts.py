"""The store of warm starts: what goes in comes out, and nothing else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq import AugmentedState
from jdeq.joint import Accelerated, starts
from jdeq.solution import Result, Solution
from jdeq.solvers import Anderson
from tests.jdeq import problems


def states(*marks):
    """An augmented state of one problem a mark, each of whose entries tells it apart."""
    mark = jnp.array(marks, float)[:, None]
    z = {"a": mark + jnp.arange(2) / 10, "b": (mark[..., None] * jnp.ones((1, 2, 3)),)}
    return AugmentedState(z, mark + 0.5, jax.tree.map(jnp.negative, z))


def found(*marks, result=Result.converged):
    value, count = states(*marks), len(marks)
    codes = jnp.broadcast_to(jnp.asarray(result, jnp.int32), (count,))
    return Solution(value, codes, jnp.ones(count, jnp.int32), jnp.zeros(count))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


COLD = (0.0, 0.0, 0.0)


def test_what_was_stored_is_found_again_and_the_rest_starts_cold():
    store = starts.init(states(0), 10)
    store = jax.jit(starts.update)(store, jnp.array([7, 2, 9]), found(70, 20, 90))
    store = jax.jit(starts.update)(store, jnp.array([2, 4]), found(21, 40))
    index = jnp.array([4, 2, 3, 9])
    got = jax.jit(starts.lookup)(store, index, states(-1, -2, -3, -4))
    assert_same(got, states(40, 21, -3, 90))
    np.testing.assert_array_equal(starts.holds(store, index), [True, True, False, True])


def test_blocks_that_are_not_kept_start_cold():
    store = starts.init(states(0), 4, keep=("x", "mu"))
    assert store.state.z is None
    store = starts.update(store, jnp.array([1, 3]), found(10, 30))
    got = starts.lookup(store, jnp.array([3, 0]), states(-1, -2))
    assert_same(got, states(30, -2)._replace(z=states(-1, -2).z))


def test_dtypes_and_bytes():
    """A slot takes 17 numbers of two bytes and the index of its owner."""
    store = starts.init(states(0), 1000, dtype=jnp.bfloat16, max_bytes=100 * 38 + 37)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(store)) == 100 * 38
    store = starts.update(store, jnp.array([5]), found(1))
    got = starts.lookup(store, jnp.array([5]), states(0))
    np.testing.assert_array_equal(got.x, states(1).x)  # 1.5 is a bfloat16
    np.testing.assert_allclose(got.z["a"], states(1).z["a"], rtol=2**-8)
    assert got.z["a"].dtype == states(0).z["a"].dtype
    assert starts.init(states(0), 3, max_bytes=10**6).owner.shape == (3,)


def test_a_slot_stays_with_its_owner():
    store = starts.init(states(0), 10, max_bytes=4 * (4 + 17 * 8))
    store = starts.update(store, jnp.array([1]), found(10))
    store = starts.update(store, jnp.array([5, 9]), found(50, 90))
    index = jnp.array([1, 5, 9])
    np.testing.assert_array_equal(starts.holds(store, index), [True, False, False])
    assert_same(starts.lookup(store, index, states(*COLD)), states(10, 0, 0))


def test_examples_of_a_batch_that_want_one_slot_do_not_mix():
    store = starts.init(states(0), 100, max_bytes=4 * (4 + 17 * 8))
    index = jnp.array([2, 6, 10, 6])
    codes = jnp.array([Result.diverged, Result.max_steps, Result.converged, Result.converged])
    store = starts.update(store, index, dataclasses.replace(found(20, 60, 100, 61), result=codes))
    np.testing.assert_array_equal(starts.holds(store, index), [False, True, False, True])
    assert_same(starts.lookup(store, jnp.array([6]), states(0)), states(60))


@pytest.mark.parametrize("result", [Result.diverged, Result.non_finite])
def test_failures_are_not_stored(result):
    store = starts.init(states(0), 5)
    store = starts.update(store, jnp.array([1]), found(10))
    store = starts.update(store, jnp.array([1, 2]), found(11, jnp.nan, result=result))
    got = starts.lookup(store, jnp.array([1, 2]), states(0, 0))
    assert_same(got, states(10, 0))


def test_negative_indices_are_no_examples():
    store = starts.init(states(0), 5)
    assert not starts.holds(store, jnp.array([-1]))[0]
    assert_same(starts.update(store, jnp.array([-1, -4]), found(1, 2)), store)


def test_a_problem_seen_again_is_solved_at_once():
    """By a method whose steps are in proportion to the gradient."""
    o = problems.optimum()
    options = {"method": Accelerated(Anderson(8), step_size=0.2), "rtol": 1e-6}
    store = starts.init(AugmentedState(o.z0, o.x0, o.z0), problems.B)
    index = jnp.arange(problems.B)
    steps = []
    for _ in range(2):
        start = starts.lookup(store, index, AugmentedState(o.z0, o.x0, o.z0))
        s = jdeq.joint_solve(
            o.problem, o.params, o.target, start.x, start.z, mu0=start.mu, **options
        )
        store = starts.update(store, index, s)
        steps.append(np.asarray(s.steps))
    # Not 1: stationarity is in units of the objective at the start, which is lower now.
    assert np.all(steps[1] <= 3)
    assert np.all(steps[0] > 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, "examples=0 was given"),
        ({"max_bytes": 100}, "one example takes 140 bytes"),
        ({"keep": ()}, "some of 'z', 'x' and 'mu' are expected"),
        ({"keep": ("x", "y")}, "some of 'z', 'x' and 'mu' are expected"),
        ({"dtype": jnp.int8}, "a floating-point dtype is expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        starts.init(states(0), **({"examples": 5} | options))
