"""The residuals, at points where they are known."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jdeq.equilibrium import Controls
from jdeq.joint import AugmentedState, augmented
from jdeq.joint.problem import purify
from tests.jdeq import problems


def at(constraint="free", scale=1.0, x=None, **moved):
    """Residuals and evaluation at the optimum, with some of its parts replaced."""
    o = problems.optimum(constraint, scale)
    rest = () if o.data is None else (o.data,)
    parts = {"z": o.z, "x": o.x if x is None else x, "mu": o.mu, **moved}
    state = AugmentedState(**{k: jnp.array(v) for k, v in parts.items()})
    pure, theta = purify("test", o.problem, o.params, o.target, o.x0, o.z0, rest)
    evaluation = augmented.evaluate(pure, theta, o.target, rest, state)
    first = problems.quadratic(o.params, o.z0, o.x0, o.target)
    residual = augmented.kkt_residual(pure, theta, rest, state, evaluation, first)
    return o, residual, evaluation, first


@pytest.mark.parametrize("constraint", ["free", "box", "ball"])
def test_all_vanish_at_the_optimum_and_nowhere_near(constraint):
    o, residual, evaluation, _ = at(constraint)
    for entry in residual:
        np.testing.assert_allclose(entry, 0, atol=1e-9)
    np.testing.assert_allclose(evaluation.objective, o.objective)
    tight = Controls(1e-8, 1e-8)
    assert np.all(augmented.meets_tolerance(residual, evaluation, tight))
    for moved in ({"z": o.z + 0.01}, {"mu": o.mu + 0.01}):
        _, residual, evaluation, _ = at(constraint, **moved)
        assert not np.any(augmented.meets_tolerance(residual, evaluation, tight))
    inwards = 0.9 * o.x
    _, residual, _, _ = at(
        constraint,
        x=inwards,
        z=inwards @ np.linalg.solve(np.eye(problems.N) - o.params["W"], o.params["U"]).T,
    )
    assert np.all(residual.stationarity > 1e-3)


def test_unconstrained_stationarity_is_the_scaled_gradient():
    o, residual, evaluation, first = at(mu=problems.optimum().mu + 0.1)
    gradient = np.linalg.norm(evaluation.gradient, axis=1)
    want = gradient * (1 + np.linalg.norm(o.x, axis=1)) / (first + o.objective)
    np.testing.assert_allclose(residual.stationarity, want)
    np.testing.assert_allclose(evaluation.gradient, np.tile(0.1 * o.params["U"].sum(0), (3, 1)))


@pytest.mark.parametrize("constraint", ["free", "box", "ball"])
def test_stationarity_is_free_of_the_objectives_units(constraint):
    o = problems.optimum(constraint)
    _, reference, _, _ = at(constraint, x=0.8 * o.x, mu=0.9 * o.mu)
    for scale in (1e-6, 1e6):
        _, residual, _, _ = at(constraint, scale, x=0.8 * o.x, mu=0.9 * scale * o.mu)
        np.testing.assert_allclose(residual.stationarity, reference.stationarity, rtol=1e-9)
        np.testing.assert_allclose(residual.state, reference.state)
        np.testing.assert_allclose(residual.adjoint, scale * reference.adjoint, rtol=1e-6)


def test_an_objective_of_zero_has_a_finite_stationarity():
    x = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    for gradient, want in ((jnp.zeros((2, 2)), 0.0), (jnp.ones((2, 2)), None)):
        length = augmented.relative_length(x, gradient, jnp.zeros(2), jnp.zeros(2))
        assert np.all(np.isfinite(length))
        if want is not None:
            np.testing.assert_array_equal(length, want)
        else:
            assert np.all(length > 1)


def test_the_guard_is_the_residual_above_its_tolerance():
    _, residual, evaluation, _ = at(z=problems.optimum().z + np.array([[1e-9], [1e-3], [1.0]]))
    guard = augmented.guard(residual, evaluation, Controls(0.0, 1e-2))
    np.testing.assert_array_equal(guard, [0, 0, residual.state[2]])
    relative = residual.state[1] / np.linalg.norm(evaluation.state[1])
    for slack, equilibrium in ((1.29, True), (1.31, False)):
        guard = augmented.guard(residual, evaluation, Controls(relative / slack, 0.0))
        assert guard[1] == (0 if equilibrium else residual.state[1])
