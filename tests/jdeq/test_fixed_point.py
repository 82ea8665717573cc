"""fixed_point and deq as functions: arguments, history, budgets, failures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems


def test_fixed_point_is_deq_without_inputs():
    p = problems.tanh()
    inner = jdeq.fixed_point(lambda params, z: p.cell(params, z, p.x), p.params, p.z0)
    outer = jdeq.deq(p.cell, p.params, p.x, p.z0)
    for got, want in zip(jax.tree.leaves(inner), jax.tree.leaves(outer), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_data_reaches_the_cell_last():
    p = problems.tanh()

    def cell(params, z, x, data):
        return jnp.where(data["mask"], p.cell(params, z, x), 0.0)

    mask = jnp.arange(problems.N) % 2 == jnp.arange(problems.B)[:, None] % 2
    solution = jdeq.deq(cell, p.params, p.x, p.z0, data={"mask": mask}, rtol=1e-11, atol=0.0)
    assert np.all(solution.value[~mask] == 0)
    for i in range(problems.B):
        keep = np.asarray(mask[i])
        W = np.asarray(p.params["W"])[np.ix_(keep, keep)]
        shift = np.asarray(p.x[i] @ p.params["U"].T + p.params["b"])[keep]
        z = np.asarray(solution.value[i])[keep]
        np.testing.assert_allclose(np.tanh(z @ W.T + shift), z, atol=1e-10)


def test_numpy_arguments_and_a_start_of_ones():
    p = problems.linear()
    params, x = jax.tree.map(np.asarray, (p.params, p.x))
    solution = jdeq.deq(p.cell, params, x, np.ones((problems.B, problems.N)), rtol=1e-11)
    np.testing.assert_allclose(solution.value, p.answer, rtol=1e-5)


def test_a_warm_start_at_the_answer_is_done_at_once():
    p = problems.tanh()
    solution = jdeq.deq(p.cell, p.params, p.x, jnp.array(p.answer))
    assert solution.steps.tolist() == [1] * problems.B
    assert np.all(solution.result == Result.converged)
    np.testing.assert_array_equal(solution.value, p.answer)


def test_absolute_and_relative_tolerance_add_up():
    """``residual <= atol + rtol ||f||`` holds at the returned step and at none before it."""
    p = problems.conditioned((0.5, 0.8, 0.9))
    for rtol, atol in [(1e-6, 0.0), (0.0, 1e-6), (1e-3, 1e-2)]:
        s = jdeq.deq(
            p.cell,
            p.params,
            p.x,
            p.z0,
            solver=Picard(),
            rtol=rtol,
            atol=atol,
            max_steps=200,
            history=lambda z: z,
        )
        for i in range(3):
            image = p.x["rate"][i] * s.history.record[:, i] + p.x["shift"][i]
            met = s.history.residual[:, i] <= atol + rtol * np.linalg.norm(image, axis=1)
            assert np.argmax(met) == s.steps[i] - 1
            assert s.residual[i] == s.history.residual[s.steps[i] - 1, i]


def test_history_keeps_residuals_and_what_is_asked_for():
    p = problems.conditioned((0.1, 0.5, 0.9))
    options = {"solver": Picard(), "rtol": 1e-6, "max_steps": 30}
    plain = jdeq.deq(p.cell, p.params, p.x, p.z0, **options)
    s = jdeq.deq(p.cell, p.params, p.x, p.z0, history=lambda z: (z[:, 0], jnp.max(z)), **options)
    assert plain.history is None
    for field in ("value", "steps", "residual", "result"):
        np.testing.assert_array_equal(getattr(s, field), getattr(plain, field))
    first, largest = s.history.record
    assert s.history.residual.shape == s.history.merit.shape == first.shape == (30, 3)
    assert largest.shape == (30,)
    for i, steps in enumerate(s.steps):
        assert np.all(np.isfinite(s.history.residual[:steps, i]))
        assert np.all(np.isnan(s.history.residual[steps:, i]))
        assert s.history.residual[steps - 1, i] == s.residual[i]
        assert first[steps - 1, i] == s.value[i, 0]
    np.testing.assert_array_equal(s.history.merit, s.history.residual)


def test_a_diverging_problem_keeps_its_best_and_says_so():
    p = problems.conditioned((0.5, 1.3, -2.0))
    for solver in (Picard(), Anderson(window=1, regularization=1e3)):
        s = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=solver, max_steps=200)
        assert s.result.tolist() == [Result.converged, Result.diverged, Result.diverged]
        np.testing.assert_array_equal(s.value[1:], p.z0[1:])
        shift = np.linalg.norm(p.x["shift"], axis=1)
        np.testing.assert_allclose(s.residual[1:], shift[1:])


def test_a_residual_that_grows_steeply_hides_no_divergence():
    """Regression: beside what the first steps grew to, the start looked like a solution."""

    def value(shift):
        s = jdeq.fixed_point(lambda b, z: 1e5 * z + b, shift, jnp.zeros((1, 2)), solver=Picard())
        return jnp.sum(s.value), s.result

    gradient, result = jax.grad(value, has_aux=True)(jnp.ones(2))
    assert result.tolist() == [Result.diverged]
    assert gradient.tolist() == [0, 0]


def test_an_unstable_rest_point_is_left_without_being_called_divergence():
    """Regression: from next to nothing to one is a large factor, and no divergence."""
    x = jnp.full((1, 1), 1e-7)
    s = jdeq.deq(
        lambda p, z, x: jnp.tanh(2 * z + x),
        None,
        x,
        jnp.zeros((1, 1)),
        solver=Picard(),
        rtol=1e-9,
        atol=0.0,
        max_steps=200,
    )
    assert s.result.tolist() == [Result.converged]
    assert s.value[0, 0] > 0.9


def test_an_equilibrium_far_from_the_start_is_returned():
    """Regression: one step to 1e7 converged, but counted as divergence, and z0 was returned."""
    x = jnp.ones((1, 2))
    s = jdeq.deq(lambda p, z, x: (1 - 1e-7) * z + x, None, x, 0 * x, max_steps=50, rtol=1e-9)
    assert s.result.tolist() == [Result.converged]
    np.testing.assert_allclose(s.value, 1e7, rtol=1e-2)


def test_the_step_budget_is_a_limit_that_may_be_traced():
    p = problems.conditioned((0.9, 0.9, 0.99))
    options = {"solver": Picard(), "max_steps": 20}

    @jax.jit
    def run(budget):
        return jdeq.deq(p.cell, p.params, p.x, p.z0, step_budget=budget, **options)

    for budget in (1, 7, 20, 50):
        s = run(budget)
        want = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=Picard(), max_steps=min(budget, 20))
        assert s.steps.tolist() == [min(budget, 20)] * 3
        np.testing.assert_array_equal(s.value, want.value)
    assert run._cache_size() == 1


def test_tolerances_may_be_traced():
    p = problems.tanh()

    @jax.jit
    def run(rtol, atol):
        return jdeq.deq(p.cell, p.params, p.x, p.z0, rtol=rtol, atol=atol).steps

    loose, tight = run(1e-2, 0.0), run(1e-10, 0.0)
    assert np.all(loose < tight)
    assert run._cache_size() == 1
    want = jdeq.deq(p.cell, p.params, p.x, p.z0, rtol=1e-10, atol=0.0).steps
    np.testing.assert_array_equal(tight, want)


def test_nan_in_one_problem_leaves_the_others_bit_identical():
    """Wherever it enters, and whether the solve needs it at once or only later."""
    p = problems.tanh()

    def cell(params, z, x, data):
        return p.cell(params, z, x) + data

    def run(x, z0, data):
        return jdeq.deq(cell, p.params, x, z0, data=data, rtol=1e-9)

    arguments = (p.x, p.z0, 0 * p.z0)
    clean = run(*arguments)
    for place in range(3):
        for bad in (jnp.nan, jnp.inf):
            poisoned = [*arguments]
            poisoned[place] = poisoned[place].at[1, 2].set(bad)
            s = run(*poisoned)
            if place == 0 and bad == jnp.inf:
                continue  # tanh turns it into one
            assert s.result.tolist() == [Result.converged, Result.non_finite, Result.converged]
            assert s.steps[1] == 1
            for field in ("value", "steps", "residual"):
                np.testing.assert_array_equal(getattr(s, field)[::2], getattr(clean, field)[::2])


def test_a_late_nan_keeps_the_last_good_iterate():
    def cell(params, z, x):
        return jnp.where(z > x, jnp.nan, z + 1)

    s = jdeq.deq(
        cell, None, jnp.array([[3.5], [9.0]]), jnp.zeros((2, 1)), solver=Picard(), max_steps=6
    )
    assert s.result.tolist() == [Result.non_finite, Result.max_steps]
    assert s.steps.tolist() == [5, 6]
    assert np.all(np.isfinite(s.value))
    np.testing.assert_array_equal(s.residual, 1)
