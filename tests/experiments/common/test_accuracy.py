"""The controller of inner iterations, by the formulas of its docstring."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from experiments.common.accuracy import AccuracyControl, estimated_errors
from jdeq import AugmentedState, KKTResidual
from jdeq.solution import Result, Solution

CONTROL = AccuracyControl(first=0.4, last=0.1, least=10, most=80, steps=5)


def after(state, errors, step=0, times=1):
    for _ in range(times):
        state = CONTROL.adjusted(state, jnp.asarray(errors), jnp.asarray(step))
    return state


def test_the_error_allowed_falls_geometrically():
    allowed = [float(CONTROL.allowed(jnp.asarray(step))) for step in range(5)]
    np.testing.assert_allclose(allowed, [0.4, 0.4 / 2**0.5, 0.2, 0.2 / 2**0.5, 0.1], rtol=1e-6)
    single = AccuracyControl(first=0.4, last=0.1, least=1, most=1, steps=1)
    assert float(single.allowed(jnp.asarray(0))) == pytest.approx(0.4)


def test_iterations_grow_where_the_median_exceeds_what_is_allowed():
    state = jnp.asarray(40.0, jnp.float32)
    assert float(after(state, [0.0, 0.5, 1.0])) == pytest.approx(42)
    assert float(after(state, [0.3, 0.3, 1.0])) == pytest.approx(40 / 1.05)
    assert float(after(state, [0.3, 0.3, 1.0], step=4)) == pytest.approx(42)  # tighter by then


def test_iterations_stay_within_their_bounds():
    state = CONTROL.start()
    assert CONTROL.iterations(state) == 80
    assert CONTROL.iterations(after(state, [0.9] * 3, times=9)) == 80
    low = after(state, [0.01] * 3, times=99)
    assert CONTROL.iterations(low) == 10
    assert low.dtype == state.dtype == jnp.float32
    assert CONTROL.iterations(low).dtype == jnp.int32
    # From one iteration, too, there is a way up.
    small = AccuracyControl(first=0.4, last=0.1, least=1, most=9, steps=5)
    state = jnp.asarray(1.0, jnp.float32)
    for _ in range(50):
        state = small.adjusted(state, jnp.ones(3), jnp.asarray(0))
    assert small.iterations(state) == 9


def test_it_finds_the_number_of_iterations_at_which_the_errors_are_as_allowed():
    state = CONTROL.start()
    for _ in range(60):
        errors = jnp.exp2(-CONTROL.iterations(state) / 10) * jnp.array([0.1, 1.0, 9.0])
        state = CONTROL.adjusted(state, errors, jnp.asarray(2))
    assert float(state) == pytest.approx(10 * np.log2(1 / 0.2), rel=0.1)


def test_the_estimate_is_that_of_the_residuals_and_one_where_a_solve_failed():
    ones = jnp.ones((4, 4))
    value = AugmentedState(ones, jnp.ones((4, 2)), 2 * ones)  # of norms 2 and 4
    residual = KKTResidual(
        state=jnp.array([0.1, 0.1, 1.0, 0.1]),
        adjoint=jnp.array([0.4, 0.0, 8.0, 0.4]),
        stationarity=jnp.array([0.05, 0.0, 1.0, 0.05]),
    )
    result = jnp.array([Result.max_steps, Result.converged, Result.max_steps, Result.diverged])
    solution = Solution(value, result, jnp.ones(4, int), residual)
    np.testing.assert_allclose(estimated_errors(solution), [0.2, 0.05, 1, 1], rtol=1e-6)
    assert not np.isfinite(jdeq.joint.hypergradient_error(solution).envelope[3])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"first": 0.1, "last": 0.3}, "that do not grow"),
        ({"last": 0.0}, "numbers between 0 and 1 are expected"),
        ({"first": 1.0}, "numbers between 0 and 1 are expected"),
        ({"least": 0}, "a range of at least 1 is expected"),
        ({"least": 81}, "at least 81 and at most 80 inner iterations were given"),
    ],
)
def test_settings_out_of_range_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        AccuracyControl(**{"first": 0.4, "last": 0.1, "least": 10, "most": 80, "steps": 5} | change)
