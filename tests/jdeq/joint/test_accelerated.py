from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.joint import Accelerated
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems

SCHEDULE = optax.piecewise_constant_schedule(0.2, {5: 0.25})


@pytest.mark.parametrize(
    ("step_size", "rates"), [(0.1, [0.1] * 10), (SCHEDULE, [0.2] * 5 + [0.05] * 5)]
)
def test_under_picard_it_takes_the_published_steps(step_size, rates):
    """Equations 9 to 11 of Gurumurthy et al. (2021), replayed by hand on a linear problem."""
    o = problems.optimum("box")
    method = Accelerated(Picard(), step_size, state_relaxation=0.8, adjoint_relaxation=0.6)
    s = jdeq.joint_solve(
        *o.arguments, method=method, max_steps=10, rtol=1e-13, history=lambda state: state
    )
    W, U, t = (np.asarray(v) for v in (o.params["W"], o.params["U"], o.target))
    z, x, mu = (np.asarray(v) for v in (o.z0, o.x0, o.z0))
    for k, rate in enumerate(rates):
        np.testing.assert_allclose(s.history.record.z[k], z, rtol=1e-6)
        np.testing.assert_allclose(s.history.record.x[k], x, rtol=1e-6)
        np.testing.assert_allclose(s.history.record.mu[k], mu, rtol=1e-6)
        g = mu @ U + problems.WEIGHT * x
        adjoint, f = mu @ W + z - t, z @ W.T + x @ U.T
        z, mu = z + 0.8 * (f - z), mu + 0.6 * (adjoint - mu)
        x = np.clip(x - rate * g, -0.2, 0.3)


def test_anderson_solves_a_linear_kkt_system_in_as_many_steps_as_it_has_dimensions():
    o = problems.optimum()
    dimension = 2 * problems.N + problems.M
    method = Accelerated(Anderson(window=dimension, regularization=0.0), step_size=0.1)
    s = jdeq.joint_solve(*o.arguments, method=method, rtol=1e-6, max_steps=100)
    assert np.all(s.result == Result.converged)
    assert np.all(s.steps <= dimension + 3)


def test_the_published_window_beats_no_window():
    o = problems.optimum()
    mixed = jdeq.joint_solve(*o.arguments, method=Accelerated(), rtol=1e-6, max_steps=2000)
    plain = jdeq.joint_solve(*o.arguments, method=Accelerated(Picard()), rtol=1e-6, max_steps=2000)
    assert np.all(mixed.result == Result.converged)
    assert np.all(3 * mixed.steps < plain.steps)


def test_mixtures_are_projected_again():
    """Anderson extrapolates out of the ball, the published code's flaw."""
    o = problems.optimum("ball")
    s = jdeq.joint_solve(
        o.problem,
        o.params,
        20 * o.target,
        o.x0,
        o.z0,
        data=o.data,
        method=Accelerated(step_size=0.5),
        max_steps=40,
        rtol=1e-12,
        history=lambda state: jnp.linalg.norm(state.x, axis=1),
    )
    assert np.all(s.history.record <= o.data["radius"] * (1 + 1e-12))
