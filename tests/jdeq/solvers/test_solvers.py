"""What holds for every solver on every problem."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Anderson, Broyden, NewtonKrylov, Picard, Reversible, Solver
from tests.jdeq import problems

SOLVERS = {
    "picard": Picard(),
    "damped": Picard(damping=0.7),
    "anderson": Anderson(),
    "one": Anderson(kind="I"),
    "mixed": Anderson(window=2, mixing=0.6, regularization=1e-6),
    "good": Broyden(),
    "bad": Broyden(window=8, kind="bad", mixing=0.7),
    "reversible": Reversible(0.8),
    "newton": NewtonKrylov(dimension=6, forcing=1e-3),
}
SOME = ["damped", "anderson", "one", "good"]
NEIGHBOURS = [*SOME, "newton"]


def norms(tree) -> np.ndarray:
    rows = [
        np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tree)
    ]
    return np.linalg.norm(np.concatenate(rows, axis=1), axis=1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("problem", problems.EQUILIBRIA)
def test_finds_the_answer_and_reports_its_residual(problem, name):
    p = problems.EQUILIBRIA[problem]()
    # The float32 leaf of the tree limits what can be asked of it.
    tolerance, rounding = (1e-4, 1e-6) if problem == "tree" else (1e-11, 1e-13)
    solution = jdeq.deq(
        p.cell, p.params, p.x, p.z0, solver=SOLVERS[name], rtol=tolerance, atol=0.0, max_steps=400
    )
    assert np.all(solution.result == Result.converged)
    assert np.all(solution.converged)
    # No map here contracts by less than a tenth.
    bound = {"rtol": 10 * tolerance, "atol": 10 * tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **bound), solution.value, p.answer)
    image = p.cell(p.params, solution.value, p.x)
    difference = jax.tree.map(jnp.subtract, image, solution.value)
    np.testing.assert_allclose(solution.residual, norms(difference), rtol=1e-4, atol=rounding)
    assert np.all(solution.residual <= tolerance * norms(image) * (1 + 1e-6))
    assert np.all((solution.steps >= 1) & (solution.steps <= 400))
    assert jax.tree.map(lambda v: (v.shape, v.dtype), solution.value) == jax.tree.map(
        lambda v: (v.shape, v.dtype), p.z0
    )


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_is_a_solver_that_hashes_by_value(solver):
    assert isinstance(solver, Solver)
    twin = type(solver)(**{f: getattr(solver, f) for f in solver.__dataclass_fields__})
    assert twin == solver
    assert hash(twin) == hash(solver)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_returns_the_start(name):
    p = problems.linear()
    z0 = jnp.ones_like(p.z0)
    solution = jdeq.deq(p.cell, p.params, p.x, z0, solver=SOLVERS[name], max_steps=1)
    assert np.all(solution.result == Result.max_steps)
    # Newton's method counts its Jacobian-vector products, too.
    assert np.all((solution.steps == 1) | (name == "newton"))
    np.testing.assert_array_equal(solution.value, z0)
    np.testing.assert_allclose(solution.residual, norms(p.cell(p.params, z0, p.x) - z0))


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_change_nothing(name):
    """To the last bit, whether they finish before or after, or are not even numbers."""
    options = {"solver": SOLVERS[name], "rtol": 1e-9, "max_steps": 60}
    p = problems.conditioned((0.1, 0.5, 0.9))
    reference = jdeq.deq(p.cell, p.params, p.x, p.z0, **options)
    for rate in (0.0, 0.99, 1.7, jnp.nan):
        x = {**p.x, "rate": p.x["rate"].at[0].set(rate)}
        other = jdeq.deq(p.cell, p.params, x, p.z0, **options)
        for field in ("value", "steps", "residual", "result"):
            np.testing.assert_array_equal(
                getattr(other, field)[1:], getattr(reference, field)[1:], err_msg=field
            )


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_problem_of_a_batch_equals_the_problem_alone(name):
    options = {"solver": SOLVERS[name], "rtol": 1e-9, "atol": 0.0, "max_steps": 300}
    p = problems.tanh(norm=0.7)
    batch = jdeq.deq(p.cell, p.params, p.x, p.z0, **options)
    for i in range(problems.B):
        alone = jdeq.deq(p.cell, p.params, p.x[i : i + 1], p.z0[i : i + 1], **options)
        np.testing.assert_allclose(alone.value[0], batch.value[i], rtol=1e-12, atol=1e-13)
        assert alone.steps[0] == batch.steps[i]


@pytest.mark.parametrize("name", SOME)
def test_float32_stagnates_at_its_rounding_floor(name):
    """Also with x64 on: a state keeps its dtype, and the floor is reported as residual."""
    p = problems.tanh()
    arguments = jax.tree.map(lambda v: v.astype(jnp.float32), (p.params, p.x, p.z0))
    solution = jdeq.deq(
        p.cell, *arguments, solver=SOLVERS[name], rtol=0.0, atol=1e-12, max_steps=500
    )
    assert solution.value.dtype == jnp.float32
    # A residual of exactly zero is possible, too, and then converged.
    floor = np.where(solution.residual > 0, Result.stagnated, Result.converged)
    np.testing.assert_array_equal(solution.result, floor)
    assert np.all(solution.residual < 1e-5)
    np.testing.assert_allclose(solution.value, p.answer, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_bfloat16_is_kept_and_its_residual_is_float32(name):
    p = problems.linear(norm=0.5)
    arguments = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (p.params, p.x, p.z0))
    solution = jdeq.deq(p.cell, *arguments, solver=SOLVERS[name], rtol=1e-2)
    assert solution.value.dtype == jnp.bfloat16
    assert solution.residual.dtype == jnp.float32
    assert np.all(solution.result == Result.converged)
    np.testing.assert_allclose(solution.value.astype(jnp.float64), p.answer, atol=0.05)
