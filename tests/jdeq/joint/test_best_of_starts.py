"""Several starts a problem, on an objective of two wells whose minima are known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import KKTImplicit, StateImplicit
from jdeq.joint import Accelerated, best_of_starts
from jdeq.joint.best_of_starts import _winner
from jdeq.solution import Result
from jdeq.solvers import Picard

PARAMS = {"w": np.array(0.5), "u": np.array(0.8)}
RATIO = 0.8 / (1 - 0.5)
"""z over x at equilibrium."""

TARGET = {
    "wells": np.array([[-2.0, 1.0], [-2.0, 1.0], [-1.0, 3.0]]),
    "depth": np.array([[0.2, 0.4], [0.4, 0.2], [0.5, 0.1]]),
}
BEST = np.array([1, 0, 0])
"""The deeper of each problem's wells, at the place and objective below."""
PLACE, DEPTH = np.array([1.0, -2.0, -1.0]), np.array([-0.4, -0.4, -0.5])

X0 = np.array([[-2.5, -2.5, -2.0], [1.5, 1.5, 2.5]])[:, :, None]
"""A start on either side, ``[S, B, 1]``."""
Z0 = np.zeros((3, 1))
METHOD = Accelerated(Picard(), step_size=0.1)
"""It does not leave the well that it starts in."""

SOLVE = {"method": METHOD, "rtol": 1e-9, "max_steps": 1000}


def cell(params, z, x):
    return params["w"] * z + params["u"] * x


def two_wells(params, z, x, target):
    return jnp.min(0.5 * (z - target["wells"]) ** 2 - target["depth"], axis=1)


PROBLEM = jdeq.InputProblem(cell, two_wells)


def solve(params=PARAMS, target=TARGET, x0=X0, **options):
    return best_of_starts(PROBLEM, params, target, x0, Z0 + RATIO * x0[0], **(SOLVE | options))


def test_the_deeper_well_is_returned():
    s = solve()
    np.testing.assert_array_equal(s.aux.start, BEST)
    np.testing.assert_allclose(s.value.z[:, 0], PLACE, rtol=1e-7)
    np.testing.assert_allclose(s.value.x[:, 0], PLACE / RATIO, rtol=1e-7)
    np.testing.assert_allclose(s.aux.objective, DEPTH, rtol=1e-9)
    np.testing.assert_allclose(np.sort(s.aux.objectives, 0), np.sort(-TARGET["depth"].T, 0))
    assert np.all(s.result == Result.converged)


def test_each_start_alone_is_solved_as_by_joint_solve():
    s = solve(history=True)
    z0 = Z0 + RATIO * X0[0]
    alone = [jdeq.joint_solve(PROBLEM, PARAMS, TARGET, x0, z0, history=True, **SOLVE) for x0 in X0]
    for b, start in enumerate(BEST):
        np.testing.assert_allclose(s.value.x[b], alone[start].value.x[b], rtol=1e-12)
        np.testing.assert_allclose(
            s.history.merit[:, b], alone[start].history.merit[:, b], rtol=1e-12
        )
    np.testing.assert_array_equal(s.steps, alone[0].steps + alone[1].steps)


def test_jit_vmap_and_compaction_change_nothing():
    want = solve()
    jitted = jax.jit(lambda x0: solve(x0=x0))(X0)
    compacted = solve(compaction=1)
    for got in (jitted, compacted):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-7), got, want)
    # Starts in the opposite order: the other one wins, with the same answer.
    batch = jax.vmap(lambda x0: solve(x0=x0))(jnp.stack([X0, X0[::-1]]))
    np.testing.assert_array_equal(batch.aux.start, [BEST, 1 - BEST])
    np.testing.assert_allclose(batch.value.z[:, :, 0], [PLACE, PLACE], rtol=1e-7)


def test_gradients_are_those_of_the_chosen_solution():
    """With x held z moves by ``x / (1 - w)``; a whole KKT point stays in its well."""

    def total(adjoint, params, target):
        state = solve(params, target, adjoint=adjoint).value
        return jnp.sum(state.z) + 3 * jnp.sum(state.x)

    params_bar, target_bar = jax.grad(total, argnums=(1, 2))(StateImplicit(), PARAMS, TARGET)
    np.testing.assert_allclose(params_bar["u"], np.sum(PLACE / RATIO) / 0.5, rtol=1e-6)
    np.testing.assert_array_equal(target_bar["wells"], 0)
    full = jax.jit(jax.grad(functools.partial(total, KKTImplicit()), argnums=(0, 1)))
    params_bar, target_bar = full(PARAMS, TARGET)
    np.testing.assert_allclose(params_bar["u"], -3 * np.sum(PLACE) * 0.5 / 0.8**2, rtol=1e-6)
    moved = np.eye(2)[BEST] * (1 + 3 / RATIO)
    np.testing.assert_allclose(target_bar["wells"], moved, rtol=1e-6, atol=1e-9)


def test_what_functions_capture_gets_its_gradient():
    def total(offset):
        problem = jdeq.InputProblem(lambda p, z, x: cell(p, z, x) + offset, two_wells)
        s = best_of_starts(problem, PARAMS, TARGET, X0, Z0 + RATIO * X0[0], **SOLVE)
        return jnp.sum(s.value.z)

    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.0), 3 / 0.5, rtol=1e-6)


def test_a_failed_start_is_passed_over():
    broken = np.array(X0)
    broken[0, 1] = np.nan  # of the second problem, the start in the deeper well

    def total(params):
        s = best_of_starts(PROBLEM, params, TARGET, broken, Z0, **SOLVE)
        return jnp.sum(s.value.z), s

    gradient, s = jax.grad(total, has_aux=True)(PARAMS)
    np.testing.assert_array_equal(s.aux.start, [1, 1, 0])
    np.testing.assert_allclose(s.value.z[:, 0], [1.0, 1.0, -1.0], rtol=1e-6)
    assert np.all(np.isfinite(list(gradient.values())))


def test_convergence_comes_before_the_objective_and_that_before_the_order():
    c, m, d = Result.converged, Result.max_steps, Result.diverged
    results = jnp.array([[m, m, d, c, d], [c, m, m, c, d]])
    objectives = jnp.array([[0.0, 1, 0, 2, jnp.inf], [1, 0, 5, 2, jnp.inf]])
    np.testing.assert_array_equal(_winner(objectives, results), [1, 1, 1, 0, 0])


def test_the_backward_solve_is_of_the_chosen_alone():
    def total(probe):
        return jnp.sum(solve(backward_probe=probe).value.z)

    outcome = jax.grad(total)(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(outcome[:, 2], Result.converged)
    assert np.all(outcome[:, 1] >= 1)


def test_envelope_gradient_of_the_best():
    def value(params):
        z, x, mu = solve(params).value
        values, s = jdeq.input_value(PROBLEM, params, TARGET, x, z, mu0=mu, **SOLVE)
        return jnp.sum(values), s

    gradient, s = jax.grad(value, has_aux=True)(PARAMS)
    np.testing.assert_allclose(s.aux.objective, DEPTH, rtol=1e-9)
    assert np.all(s.steps <= 20)
    np.testing.assert_allclose(list(gradient.values()), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": X0[0]}, ValueError, r"x0 has shape \(3, 1\), but its first axis is the starts"),
        ({"x0": jnp.zeros((2, 4, 1))}, ValueError, "the 3 problems of z0"),
        ({"history": lambda s: s.x}, TypeError, "True or False is expected"),
        ({"method": "adam"}, TypeError, "an instance such as"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        best_of_starts(
            **{
                "problem": PROBLEM,
                "params": PARAMS,
                "target": TARGET,
                "x0": X0,
                "z0": Z0,
                **options,
            }
        )
