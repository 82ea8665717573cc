"""A problem in other units of its input has the same solutions and the same trajectories."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from experiments.common.scaling import scale_problem
from tests.experiments.common import linear

SCALED = scale_problem(linear.PROBLEM)


def trajectory(problem, at, rate, steps=15):
    method = jdeq.joint.Descent(optax.adam(rate, b1=0.8, b2=0.95, eps=1e-20))
    return jdeq.joint_solve(
        problem, at.params, at.target, at.x0, at.z0, data=at.data, method=method,
        max_steps=steps, rtol=0.0, atol=0.0, history=lambda state: state.x,
    ).history.record  # fmt: skip


@pytest.mark.parametrize("rate", [0.05, 0.7])
def test_adam_at_rate_one_on_the_scaled_input_is_adam_at_that_rate(rate):
    at = linear.problems(0)
    direct = trajectory(linear.PROBLEM, at, rate)
    scaled = rate * trajectory(SCALED, at.scaled(rate), 1.0)
    assert np.ptp(direct) > rate
    np.testing.assert_allclose(scaled, direct, rtol=1e-3, atol=1e-5)


def test_the_constraint_set_is_scaled_along():
    at = linear.problems(0)._replace(data=jnp.full((linear.COUNT, 1), 0.3))
    boxed = jdeq.InputProblem(
        lambda params, z, x, data: linear.cell(params, z, x),
        lambda params, z, x, target, data: linear.objective(params, z, x, target),
        lambda x, data: jnp.clip(x, -data, data),
    )
    direct = trajectory(boxed, at, 0.2)
    scaled = 0.2 * trajectory(scale_problem(boxed), at.scaled(0.2), 1.0)
    assert np.abs(direct).max() == pytest.approx(0.3)
    np.testing.assert_allclose(scaled, direct, rtol=1e-3, atol=1e-5)
