"""joint_solve: the optimum, what is said of it, and what a bad problem does."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.joint import Accelerated, Descent, JointAux, Polished
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems

METHODS = {
    "polished": Polished(),
    "descent": Descent(optax.sgd(0.2)),
    "momentum": Descent(
        optax.sgd(0.05, 0.7, nesterov=True), state_relaxation=0.9, adjoint_relaxation=0.8
    ),
    "accelerated": Accelerated(step_size=0.2),
    "accelerated II": Accelerated(Anderson(5), step_size=0.2),
    "relaxed": Accelerated(Picard(), step_size=0.2),
}
CONSTRAINTS = ["free", "box", "ball"]


def kkt(o, value):
    """The three residuals and the objective of a value, from their definitions."""
    rest = () if o.data is None else (o.data,)

    @jax.jit
    def evaluate(z, x, mu):
        f, pull_back = jax.vjp(lambda z, x: o.problem.cell(o.params, z, x, *rest), z, x)
        by_z, by_x = pull_back(mu)
        loss, pull_back = jax.vjp(
            lambda z, x: o.problem.objective(o.params, z, x, o.target, *rest), z, x
        )
        loss_z, loss_x = pull_back(jnp.ones_like(loss))
        return f, by_z + loss_z, by_x + loss_x, loss

    def project(x):
        return x if o.problem.project is None else o.problem.project(x, *rest)

    z, x, mu = value
    f, adjoint, g, loss = evaluate(z, x, mu)
    first = evaluate(o.z0, project(o.x0), jnp.zeros_like(o.z0))[3]
    size = 1 + np.linalg.norm(x, axis=1)
    length = size**2 / (np.abs(first) + np.abs(loss))
    step = x - project(x - length[:, None] * g)
    return (
        np.linalg.norm(f - z, axis=1),
        np.linalg.norm(adjoint - mu, axis=1),
        np.linalg.norm(step, axis=1) / size,
        loss,
        np.linalg.norm(f, axis=1),
        np.linalg.norm(adjoint, axis=1),
    )


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", METHODS)
def test_finds_the_optimum_and_reports_its_residuals(name, constraint):
    o = problems.optimum(constraint)
    solve = {"method": METHODS[name], "rtol": 1e-7, "max_steps": 1500}
    s = jdeq.joint_solve(*o.arguments, data=o.data, **solve)
    assert np.all(s.result == Result.converged)
    assert np.all(s.converged)
    for got, want in ((s.value.x, o.x), (s.value.z, o.z), (s.value.mu, o.mu)):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert isinstance(s.aux, JointAux)
    np.testing.assert_allclose(s.aux.objective, o.objective, rtol=1e-6)

    state, adjoint, stationarity, objective, f, a = kkt(o, s.value)
    np.testing.assert_allclose(s.residual.state, state, rtol=1e-5, atol=1e-14)
    np.testing.assert_allclose(s.residual.adjoint, adjoint, rtol=1e-5, atol=1e-14)
    np.testing.assert_allclose(s.residual.stationarity, stationarity, rtol=1e-5, atol=1e-14)
    np.testing.assert_allclose(s.aux.objective, objective, rtol=1e-12)
    assert np.all(s.residual.state <= 1.01e-7 * f + 1e-8)
    assert np.all(s.residual.adjoint <= 1.01e-7 * a + 1e-8)
    assert np.all(s.residual.stationarity <= 1.01e-7 + 1e-8)
    assert np.all((s.steps > 1) & (s.steps < 1500))


def test_the_closed_form_has_active_constraints():
    """Or the tests above would not test projections."""
    box, ball = problems.optimum("box").x, problems.optimum("ball")
    assert np.any(box == -0.2)
    assert np.any(box == 0.3)
    assert np.any((box > -0.2) & (box < 0.3))
    np.testing.assert_allclose(np.linalg.norm(ball.x, axis=1)[:2], ball.data["radius"][:2])
    assert np.linalg.norm(ball.x[2]) < ball.data["radius"][2]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_default_takes_the_same_steps_whatever_the_units_of_the_objective(constraint):
    """Regression: retreats to an anchor measured off equilibrium never ended at a small scale, and
    the first quasi-Newton step was the bare gradient."""
    solve = {"rtol": 1e-6, "atol": 0.0, "max_steps": 1000}
    o = problems.optimum(constraint)
    reference = jdeq.joint_solve(*o.arguments, data=o.data, **solve)
    for scale in (1e-4, 1e-2, 1e4):
        o = problems.optimum(constraint, scale)
        s = jdeq.joint_solve(*o.arguments, data=o.data, **solve)
        assert np.all(s.result == Result.converged)
        assert np.all(np.abs(s.steps - reference.steps) <= 2)
        np.testing.assert_allclose(s.value.x, o.x, atol=1e-4)
        np.testing.assert_allclose(s.aux.objective, o.objective, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_patience_stops_where_the_objective_no_longer_falls(sign):
    """And what is returned has exact residuals; the look-ahead chose it by inexact ones."""
    o = problems.optimum()

    def objective(params, z, x, target):
        return problems.quadratic(params, z, x, target) - (sign < 0) * 1e3

    problem = jdeq.InputProblem(o.problem.cell, objective)
    s = jdeq.joint_solve(
        problem, *o.arguments[1:], method=jdeq.joint.Descent(optax.sgd(0.1)), rtol=0.0, atol=0.0,
        max_steps=3000, patience=20,
    )  # fmt: skip
    assert np.all(s.result == Result.stagnated)
    assert np.all(s.steps < 1000)
    W, U = o.params["W"], o.params["U"]
    z, x, mu = s.value
    np.testing.assert_allclose(s.aux.objective, objective(o.params, z, x, o.target), rtol=1e-12)
    np.testing.assert_allclose(
        s.residual.state, np.linalg.norm(z @ W.T + x @ U.T - z, axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(
        s.residual.adjoint, np.linalg.norm(mu @ W + z - o.target - mu, axis=1), rtol=1e-6
    )


def test_the_default_call_needs_no_options():
    o = problems.optimum()
    s = jdeq.joint_solve(*o.arguments)
    assert np.all(s.result == Result.converged)
    np.testing.assert_allclose(s.value.x, o.x, atol=5e-3)
    np.testing.assert_allclose(s.aux.objective, o.objective, rtol=1e-3)
    assert s.history is None


@pytest.mark.parametrize("name", ["polished", "momentum", "accelerated"])
@pytest.mark.parametrize("constraint", ["box", "ball"])
def test_every_iterate_is_feasible(name, constraint):
    """What is evaluated, not only what is returned; also if the start is not."""
    o = problems.optimum(constraint)
    s = jdeq.joint_solve(
        o.problem,
        o.params,
        5 * o.target,
        o.x0 + 3.0,
        o.z0,
        data=o.data,
        method=METHODS[name],
        max_steps=80,
        rtol=1e-10,
        history=lambda state: state.x,
    )
    run = s.history.record[: int(jnp.max(s.steps))]
    for x in (run, s.value.x):
        if constraint == "box":
            assert np.all((x >= -0.2) & (x <= 0.3))
        else:
            assert np.all(np.linalg.norm(x, axis=-1) <= o.data["radius"] * (1 + 1e-12))


def test_history_has_residuals_objectives_and_a_record():
    o = problems.optimum()
    options = {"method": Accelerated(step_size=0.2), "max_steps": 40}
    s = jdeq.joint_solve(
        *o.arguments, history=lambda state: {"mu": state.mu, "x": state.x[:, 0]}, **options
    )
    plain = jdeq.joint_solve(*o.arguments, **options)
    jax.tree.map(np.testing.assert_array_equal, plain, dataclasses.replace(s, history=None))
    for i, steps in enumerate(s.steps):
        for name in ("state", "adjoint", "stationarity"):
            rows = getattr(s.history.residual, name)[:, i]
            assert np.all(np.isfinite(rows[:steps]))
            assert np.all(np.isnan(rows[steps:]))
            assert rows[steps - 1] == getattr(s.residual, name)[i]
        assert s.history.merit[steps - 1, i] == s.aux.objective[i]
        np.testing.assert_array_equal(s.history.record["mu"][steps - 1, i], s.value.mu[i])
    first = problems.quadratic(o.params, o.z0, o.x0, o.target)
    np.testing.assert_allclose(s.history.merit[0], first)
    assert s.history.record["x"].shape == (40, problems.B)


def test_an_unconverged_solve_returns_a_low_objective_near_equilibrium():
    """By the rule of joint_solve's documentation, checked on the history."""
    rng = np.random.default_rng(0)
    W = jnp.array(problems.matrix(rng, problems.N, problems.N, 0.9))
    o = problems.optimum()
    params = {**o.params, "W": W}
    method = Accelerated(Anderson(4), step_size=0.3)
    record = {"history": lambda state: state, "method": method, "max_steps": 40, "rtol": 1e-13}
    s = jdeq.joint_solve(o.problem, params, o.target, o.x0, o.z0, **record)
    merit, guard = np.asarray(s.history.merit), np.asarray(s.history.residual.state)
    for i in np.flatnonzero(s.result == Result.max_steps):
        chosen = np.argmax(np.all(s.history.record.z[:, i] == s.value.z[i], axis=1))
        assert merit[chosen, i] == s.aux.objective[i]
        assert guard[chosen, i] == s.residual.state[i]
        floor = 1e-8 + 1e-13 * np.linalg.norm(params["W"] @ s.value.z[i])
        lowest = max(np.min(guard[10:, i]), floor)
        assert guard[chosen, i] <= 1.3 * lowest * (1 + 1e-6)
        later = np.arange(40) > chosen
        competes = later & (guard[:, i] <= 1.3 * lowest)
        assert np.all(merit[competes, i] >= merit[chosen, i])
    assert np.any(s.result == Result.max_steps)


def test_a_state_that_grows_is_no_worse_an_equilibrium():
    """Regression: tolerances, which grow with the state, were held against the better iterates."""
    problem = jdeq.InputProblem(
        lambda _, z, x: 0.1 * z + x, lambda _, z, x, target: jnp.sum((z - target) ** 2, 1)
    )
    x0 = jnp.ones((1, 2))
    s = jdeq.joint_solve(
        problem, None, 100 * x0, x0, x0 / 0.9, method=Accelerated(Picard(), step_size=0.003),
        rtol=1e-2, max_steps=200, history=True,
    )  # fmt: skip
    assert s.result == Result.max_steps
    assert np.all(np.diff(s.history.merit[:, 0]) <= 0)
    np.testing.assert_array_equal(s.aux.objective, s.history.merit[-1])


def test_one_step_evaluates_the_projected_start():
    o = problems.optimum("box")
    s = jdeq.joint_solve(o.problem, o.params, o.target, o.x0 + 1, o.z0, max_steps=1)
    assert s.steps.tolist() == [1] * problems.B
    np.testing.assert_array_equal(s.value.x, 0.3)
    np.testing.assert_array_equal(s.value.z, o.z0)
    np.testing.assert_array_equal(s.value.mu, 0)
    want = problems.quadratic(o.params, s.value.z, s.value.x, o.target)
    np.testing.assert_allclose(s.aux.objective, want)


def test_the_answer_as_a_start_is_done_at_once():
    o = problems.optimum("ball")
    x, z, mu = jnp.array(o.x), jnp.array(o.z), jnp.array(o.mu)
    s = jdeq.joint_solve(o.problem, o.params, o.target, x, z, mu0=mu, data=o.data)
    assert s.steps.tolist() == [1] * problems.B
    assert np.all(s.result == Result.converged)
    # Without the adjoint the gradient is not known yet, and the solve must not stop.
    s = jdeq.joint_solve(o.problem, o.params, o.target, x, z, data=o.data)
    assert np.all(s.steps > 1)


def test_the_same_call_gives_the_same_bits():
    o = problems.optimum("ball")
    runs = [jdeq.joint_solve(*o.arguments, data=o.data, max_steps=60) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.parametrize("name", ["polished", "descent", "accelerated"])
@pytest.mark.parametrize("place", ["x0", "z0", "mu0", "target", "data"])
def test_nan_in_one_problem_leaves_the_others_bit_identical(name, place):
    o = problems.optimum("ball")
    start = {"x0": o.x0, "z0": o.z0, "mu0": o.z0, "target": o.target, "data": o.data}
    options = {"method": METHODS[name], "rtol": 1e-6, "max_steps": 600}

    def run(x0, z0, mu0, target, data):
        return jdeq.joint_solve(o.problem, o.params, target, x0, z0, mu0=mu0, data=data, **options)

    def poison(leaf):
        return leaf.at[(1,) + (0,) * (leaf.ndim - 1)].set(jnp.nan)

    clean = run(**start)
    s = run(**{**start, place: jax.tree.map(poison, start[place])})
    assert s.result.tolist() == [Result.converged, Result.non_finite, Result.converged]
    assert s.steps[1] == 1
    others = np.array([0, 2])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[others], b[others]),
        (s.value, s.residual, s.steps, s.aux),
        (clean.value, clean.residual, clean.steps, clean.aux),
    )


def test_an_unbounded_objective_diverges_without_harm():
    """The second problem's penalty has the wrong sign, so that its x runs away."""
    o = problems.optimum()

    def objective(params, z, x, target, data):
        return 0.5 * jnp.sum((z - target) ** 2, 1) + data * jnp.sum(x**2, 1)

    def cell(params, z, x, data):
        return problems.linear_cell(params, z, x)

    problem = jdeq.InputProblem(cell, objective)
    weight = jnp.array([0.25, -20.0, 0.25])
    s = jdeq.joint_solve(
        problem,
        o.params,
        o.target,
        o.x0,
        o.z0,
        data=weight,
        method=Descent(optax.sgd(0.2)),
        max_steps=500,
        rtol=1e-6,
    )
    assert s.result.tolist() == [Result.converged, Result.diverged, Result.converged]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(s.value))
    np.testing.assert_allclose(s.value.x[::2], o.x[::2], atol=1e-4)


def test_a_vanishing_objective_hides_no_divergence():
    """Regression: a state that ran past its target, with no loss beyond, seemed to be solved."""

    def hinge(params, z, x, target):
        return jnp.sum(jnp.maximum(0, target - z), 1)

    problem = jdeq.InputProblem(lambda p, z, x: p * z + x, hinge)

    def solve(p):
        ones = jnp.ones((1, 2))
        s = jdeq.joint_solve(problem, p, ones, 0.1 * ones, 0 * ones, max_steps=100)
        return jnp.sum(s.value.z), s.result

    slope, result = jax.grad(solve, has_aux=True)(2.0)
    assert result.tolist() == [Result.diverged]
    assert slope == 0


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_a_start_with_everything_zero_is_no_divergence(scale):
    """Regression: f, dl/dz and both residuals are zero at first, and all after seemed infinite."""
    o = problems.optimum()

    def objective(params, z, x, target):
        return scale * 0.5 * jnp.sum((x - 1) ** 2, 1) + scale * 0.5 * jnp.sum(z**2, 1)

    problem = jdeq.InputProblem(problems.linear_cell, objective)
    s = jdeq.joint_solve(problem, *o.arguments[1:], atol=0.0, max_steps=500)
    assert np.all(s.result == Result.converged)
    R = np.linalg.solve(np.eye(problems.N) - o.params["W"], o.params["U"])
    want = np.linalg.solve(R.T @ R + np.eye(problems.M), np.ones(problems.M))
    np.testing.assert_allclose(s.value.x, np.tile(want, (problems.B, 1)), atol=1e-3)
