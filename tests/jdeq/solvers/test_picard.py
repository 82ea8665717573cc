from __future__ import annotations

import numpy as np
import pytest

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Picard
from tests.jdeq import problems


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_converges_at_its_linear_rate(damping):
    """``z_k = (1 - r^k) z*`` with ``r = 1 - damping + damping rate`` from a start at zero."""
    rates = (0.1, 0.5, 0.9)
    p = problems.conditioned(rates)
    solution = jdeq.deq(
        p.cell,
        p.params,
        p.x,
        p.z0,
        solver=Picard(damping=damping),
        rtol=1e-8,
        atol=0.0,
        max_steps=1000,
        history=lambda z: z,
    )
    for i, rate in enumerate(rates):
        r = 1 - damping + damping * rate
        k = np.arange(solution.steps[i])
        path = (1 - r ** k[:, None]) * p.answer[i]
        np.testing.assert_allclose(
            solution.history.record[: len(k), i], path, rtol=1e-9, atol=1e-12
        )
        residual = r**k * (1 - rate) * np.linalg.norm(p.answer[i])
        np.testing.assert_allclose(solution.history.residual[: len(k), i], residual, rtol=1e-5)
        # The first step whose residual is within the tolerance of the image's norm.
        image = np.linalg.norm(path * rate + p.answer[i] * (1 - rate), axis=1)
        assert solution.steps[i] == 1 + np.argmax(residual <= 1e-8 * image)


def test_damping_tames_a_map_that_oscillates():
    p = problems.conditioned((-1.5, -1.2, -0.9))
    plain = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=Picard(), max_steps=200)
    damped = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=Picard(damping=0.5), max_steps=200)
    assert plain.result.tolist() == [Result.diverged, Result.diverged, Result.converged]
    assert np.all(damped.result == Result.converged)


@pytest.mark.parametrize("damping", [0, 0.0, -0.1, 1.1, float("nan"), "half", None, True])
def test_refuses_a_damping_outside_its_range(damping):
    with pytest.raises(ValueError, match=r"Picard: damping=.* was given, but a number in \(0, 1\]"):
        Picard(damping=damping)
