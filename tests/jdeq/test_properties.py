"""Properties over random batches: order, company and padding do not matter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems

SETTINGS = settings(max_examples=15, deadline=None, derandomize=True)
COUNT = 6
"""Problems of the whole batch; its parts are padded to it, so that one program serves all."""

seeds = st.integers(0, 2**16)
orders = st.permutations(range(COUNT))


def batch(seed):
    """Problems that differ in rate of convergence, by a per-problem factor on the state."""
    rng = np.random.default_rng(seed)
    p = problems.tanh(norm=0.95)
    x = {
        "shift": jnp.array(rng.normal(size=(COUNT, problems.N))),
        "rate": jnp.array(rng.uniform(0, 1, size=(COUNT, 1))),
    }
    return p.params, x, jnp.array(rng.normal(size=(COUNT, problems.N)))


def cell(params, z, x):
    return jnp.tanh(x["rate"] * (z @ params["W"].T) + x["shift"])


def solve(params, x, z0, solver):
    return jdeq.deq(cell, params, x, z0, solver=solver, rtol=1e-9, atol=0.0, max_steps=400)


@given(seed=seeds, order=orders, solver=st.sampled_from([Picard(), Anderson(3)]))
@SETTINGS
def test_permuting_a_batch_permutes_the_answers(seed, order, solver):
    params, x, z0 = batch(seed)
    order = np.array(order)
    straight = solve(params, x, z0, solver)
    shuffled = solve(params, jax.tree.map(lambda v: v[order], x), z0[order], solver)
    np.testing.assert_allclose(shuffled.value, straight.value[order], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(shuffled.steps, straight.steps[order])
    np.testing.assert_array_equal(shuffled.result, straight.result[order])


@given(seed=seeds, keep=st.integers(1, COUNT), filler=st.floats(-5, 5))
@SETTINGS
def test_padding_a_part_of_a_batch_keeps_its_answers(seed, keep, filler):
    params, x, z0 = batch(seed)
    whole = solve(params, x, z0, Anderson(3))
    padded = jax.tree.map(lambda v: v.at[keep:].set(filler), x)
    part = solve(params, padded, z0, Anderson(3))
    np.testing.assert_array_equal(part.value[:keep], whole.value[:keep])
    np.testing.assert_array_equal(part.steps[:keep], whole.steps[:keep])


@given(seed=seeds)
@SETTINGS
def test_splitting_a_batch_keeps_its_answers(seed):
    params, x, z0 = batch(seed)
    whole = solve(params, x, z0, Anderson(3))
    for half in (slice(0, 3), slice(3, 6)):
        part = solve(params, jax.tree.map(lambda v, half=half: v[half], x), z0[half], Anderson(3))
        np.testing.assert_allclose(part.value, whole.value[half], rtol=1e-8, atol=1e-10)


@given(seed=seeds)
@SETTINGS
def test_what_is_returned_is_what_was_measured(seed):
    params, x, z0 = batch(seed)
    s = solve(params, x, z0, Anderson(3))
    assert np.all(s.result == Result.converged)
    image = cell(params, s.value, x)
    residual = np.linalg.norm(image - s.value, axis=1)
    np.testing.assert_allclose(s.residual, residual, rtol=1e-3, atol=1e-14)
    assert np.all(residual <= 1e-9 * np.linalg.norm(image, axis=1) + 1e-14)


@given(seed=seeds, order=orders, exponent=st.integers(-8, 8))
@SETTINGS
def test_order_and_units_do_not_matter_to_the_joint_solve(seed, order, exponent):
    """Powers of two scale every number exactly; sums of several problems are never taken."""
    rng = np.random.default_rng(seed)
    o = problems.optimum()
    order = np.array(order)
    target = jnp.array(rng.normal(size=(COUNT, problems.N)))
    x0, z0 = jnp.zeros((COUNT, problems.M)), jnp.zeros((COUNT, problems.N))

    def run(scale, target):
        params = {**o.params, "scale": jnp.array(scale)}
        return jdeq.joint_solve(
            problems.FREE, params, target, x0, z0, rtol=1e-5, atol=0.0, max_steps=300
        )

    straight, other = run(1.0, target), run(2.0**exponent, target[order])
    assert np.all(straight.result == Result.converged)
    np.testing.assert_allclose(other.value.x, straight.value.x[order], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        other.aux.objective, 2.0**exponent * straight.aux.objective[order], rtol=1e-5
    )
    assert np.all(np.abs(other.steps - straight.steps[order]) <= 6)


@given(
    seed=seeds,
    bad=st.sets(st.integers(0, COUNT - 1), max_size=COUNT - 1),
    poison=st.sampled_from([np.nan, np.inf, -np.inf]),
)
@SETTINGS
def test_bad_problems_change_no_other_problem_and_no_gradient_of_one(seed, bad, poison):
    params, x, z0 = batch(seed)
    bad = np.array(sorted(bad), int)
    good = np.setdiff1d(np.arange(COUNT), bad)
    poisoned = {**x, "rate": x["rate"].at[bad].set(poison)}
    (clean_bar, clean), (bar, s) = _gradient(params, x, z0), _gradient(params, poisoned, z0)
    np.testing.assert_array_equal(s.value[good], clean.value[good])
    np.testing.assert_array_equal(s.steps[good], clean.steps[good])
    assert np.all(s.result[bad] != Result.converged)  # tanh makes a finite state of infinity
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(bar))
    for name in x:
        np.testing.assert_array_equal(bar[1][name][bad], 0)
        np.testing.assert_allclose(
            bar[1][name][good], clean_bar[1][name][good], rtol=1e-9, atol=1e-12
        )


@jax.jit
def _gradient(params, x, z0):
    def loss(params, x):
        s = solve(params, x, z0, Picard())
        return jnp.sum(jnp.sin(s.value)), s

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)
