"""The naive baseline."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.joint import InnerSolve
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems

SGD = optax.sgd(0.2)
EXACT = InnerSolve(max_steps=100, rtol=1e-9)


@pytest.mark.parametrize("constraint", ["free", "box", "ball"])
def test_finds_the_optimum(constraint):
    o = problems.optimum(constraint)
    s = jdeq.nested_solve(
        *o.arguments, data=o.data, optimizer=SGD, forward=EXACT, rtol=1e-7, max_steps=500
    )
    assert np.all(s.result == Result.converged)
    for got, want in ((s.value.x, o.x), (s.value.z, o.z), (s.value.mu, o.mu)):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(s.aux.objective, o.objective, rtol=1e-6)


def test_takes_the_steps_of_gradient_descent_on_the_reduced_objective():
    """``x <- x - a R^T (R x - t) - a w x`` with ``R = (I - W)^-1 U``, replayed by hand."""
    o = problems.optimum()
    s = jdeq.nested_solve(
        *o.arguments,
        optimizer=SGD,
        forward=InnerSolve(max_steps=200, rtol=1e-13),
        rtol=1e-13,
        max_steps=12,
        history=lambda state: (state.x, state.z),
    )
    R = np.linalg.solve(np.eye(problems.N) - o.params["W"], o.params["U"])
    x = np.zeros((problems.B, problems.M))
    xs, zs = s.history.record
    for k in range(12):
        np.testing.assert_allclose(xs[k], x, atol=1e-10)
        np.testing.assert_allclose(zs[k], x @ R.T, atol=1e-10)
        loss = 0.5 * (((x @ R.T - o.target) ** 2).sum(1) + problems.WEIGHT * (x**2).sum(1))
        np.testing.assert_allclose(s.history.merit[k], loss, rtol=1e-9)
        x = x - 0.2 * ((x @ R.T - o.target) @ R + problems.WEIGHT * x)


def test_loose_inner_solves_are_compared_to_second_order_of_their_error():
    """By the objective at the states as they are, an input is taken whose state flatters it."""
    o = problems.optimum()
    loose = InnerSolve(solver=Picard(), max_steps=200, rtol=0.01)
    s = jdeq.nested_solve(
        *o.arguments,
        optimizer=SGD,
        forward=loose,
        rtol=0.0,
        max_steps=60,
        history=lambda state: (state.x, state.z),
    )
    R = np.linalg.solve(np.eye(problems.N) - o.params["W"], o.params["U"])

    def objective(x, z):
        return 0.5 * (((z - o.target) ** 2).sum(-1) + problems.WEIGHT * (x**2).sum(-1))

    xs, zs = (np.asarray(block) for block in s.history.record)
    exact = objective(xs, xs @ R.T)
    off, merit_off = (
        np.abs(each / exact - 1).max(axis=0) for each in (objective(xs, zs), s.history.merit)
    )
    assert np.all(off > 2e-3)
    assert np.all(merit_off < 0.1 * off)
    z, x, _ = (np.asarray(block) for block in s.value)
    np.testing.assert_allclose(objective(x, x @ R.T), exact.min(axis=0), rtol=5e-5)
    np.testing.assert_allclose(s.aux.objective, objective(x, z), rtol=1e-12)


def test_states_far_from_equilibrium_never_flatter_an_input():
    """On a cell that is no contraction a few plain steps leave residuals as large as the state."""
    o = problems.optimum()
    params = {**o.params, "W": 3 * o.params["W"]}
    few = InnerSolve(solver=Picard(), max_steps=4, rtol=0.0)
    s = jdeq.nested_solve(
        o.problem,
        params,
        o.target,
        jnp.asarray(o.x),
        o.z0,
        optimizer=optax.sgd(1e-4),
        forward=few,
        rtol=0.0,
        max_steps=20,
        history=lambda state: (state.x, state.z),
    )
    x, z = (np.asarray(block) for block in s.history.record)
    objective = 0.5 * (((z - o.target) ** 2).sum(-1) + problems.WEIGHT * (x**2).sum(-1))
    merit = np.asarray(s.history.merit)
    assert np.all(merit >= 0.5 * objective)
    assert np.any(merit > 1.5 * objective)  # where the correction alone would lower it by half


def test_published_setting_counts_every_evaluation():
    """Cold solves that never stop early: 18 forward, 18 backward, and one more, a step."""
    o = problems.optimum()
    cold = InnerSolve(solver=Anderson(), max_steps=18, rtol=0.0, warm_start=False)
    s = jdeq.nested_solve(*o.arguments, optimizer=SGD, forward=cold, max_steps=5, rtol=1e-12)
    assert np.all(s.steps <= 5 * (18 + 18 + 1))
    picard = InnerSolve(solver=Picard(), max_steps=18, rtol=0.0, warm_start=False)
    s = jdeq.nested_solve(
        o.problem,
        o.params,
        o.target,
        o.x0 + 0.1,
        o.z0,
        optimizer=SGD,
        forward=picard,
        max_steps=5,
        rtol=1e-12,
    )
    assert s.steps.tolist() == [5 * 37] * problems.B


def test_warm_starts_cost_less_and_find_the_same():
    o = problems.optimum()

    def run(warm):
        inner = InnerSolve(max_steps=60, rtol=1e-8, warm_start=warm)
        return jdeq.nested_solve(
            *o.arguments, optimizer=SGD, forward=inner, max_steps=200, rtol=1e-6
        )

    warm, cold = run(True), run(False)
    np.testing.assert_allclose(warm.value.x, cold.value.x, atol=1e-6)
    assert np.all(warm.steps < cold.steps)


def test_the_backward_solve_may_have_options_of_its_own():
    o = problems.optimum()
    rough = InnerSolve(solver=Picard(), max_steps=1, rtol=0.0, warm_start=False)
    s = jdeq.nested_solve(
        *o.arguments, optimizer=SGD, forward=EXACT, backward=rough, max_steps=300, rtol=1e-6
    )
    # The adjoint stays where it started, at zero, and so x never leaves it.
    np.testing.assert_array_equal(s.value.mu, 0)
    assert np.all(s.residual.state < 1e-6)
    assert np.all(s.result == Result.max_steps)


def test_nan_in_one_problem_leaves_the_others_bit_identical():
    o = problems.optimum("ball")

    def run(target, z0, data):
        return jdeq.nested_solve(
            o.problem,
            o.params,
            target,
            o.x0,
            z0,
            data=data,
            optimizer=SGD,
            forward=EXACT,
            rtol=1e-6,
            max_steps=300,
        )

    clean = run(o.target, o.z0, o.data)
    bad = {"radius": o.data["radius"].at[1].set(jnp.nan)}
    nan = jnp.nan
    for s in (
        run(o.target.at[1, 0].set(nan), o.z0, o.data),
        run(o.target, o.z0.at[1, 0].set(nan), o.data),
        run(o.target, o.z0, bad),
    ):
        assert s.result.tolist() == [Result.converged, Result.non_finite, Result.converged]
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a[::2], b[::2]),
            (s.value, s.residual, s.steps, s.aux),
            (clean.value, clean.residual, clean.steps, clean.aux),
        )


def test_the_budget_limits_steps_on_the_input():
    o = problems.optimum()
    s = jdeq.nested_solve(
        *o.arguments, optimizer=SGD, forward=EXACT, max_steps=20, step_budget=3, history=True
    )
    assert np.sum(np.isfinite(s.history.merit[:, 0])) == 3


def test_optimisers_see_one_problem_at_a_time():
    """A norm clipped over the batch would let a large problem slow down a small one."""
    o = problems.optimum()
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    target = o.target * jnp.array([1.0, 1e3, 1.0])[:, None]
    options = {"optimizer": clipped, "forward": EXACT, "max_steps": 3, "rtol": 1e-12}
    record = {"history": lambda state: state.x}
    s = jdeq.nested_solve(o.problem, o.params, target, o.x0, o.z0, **options, **record)
    lengths = np.linalg.norm(np.diff(s.history.record, axis=0), axis=-1)
    np.testing.assert_allclose(lengths, 0.1)
