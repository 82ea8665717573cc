"""jaxopt's solvers in jdeq's loop: their own iterates, one evaluation each, one solve a problem."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import Unrolled
from jdeq.solution import Result
from jdeq.solvers import FromJaxopt, Picard, Solver
from tests.jdeq import problems

SOLVERS = {
    "picard": FromJaxopt(jaxopt.FixedPointIteration),
    "anderson": FromJaxopt(jaxopt.AndersonAcceleration, {"history_size": 3, "ridge": 1e-12}),
    "broyden": FromJaxopt(jaxopt.Broyden),
}


def solve(p, solver, **options):
    options = {"rtol": 1e-11, "atol": 0.0, "max_steps": 400} | options
    return jdeq.deq(p.cell, p.params, p.x, p.z0, solver=solver, **options)


PROBLEMS = {
    "picard": ("root",),
    "anderson": ("tanh", "tree"),
    "broyden": ("conditioned", "tree"),
}


@pytest.mark.parametrize(("name", "problem"), [(n, p) for n in PROBLEMS for p in PROBLEMS[n]])
def test_finds_the_answer(name, problem):
    p = problems.EQUILIBRIA[problem]()
    tolerance = 1e-4 if problem == "tree" else 1e-11
    solution = solve(p, SOLVERS[name], rtol=tolerance)
    assert np.all(solution.result == Result.converged)
    bound = {"rtol": 10 * tolerance, "atol": 10 * tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **bound), solution.value, p.answer)
    kept = jax.tree.map(lambda v: (v.shape, v.dtype), (solution.value, p.z0))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", SOLVERS)
def test_iterates_are_those_of_jaxopts_own_loop(name):
    """And the map is evaluated at each of them once: as often as the steps say."""
    p, steps = problems.tanh(batch=1), 7
    given = dict(SOLVERS[name].options)
    points = []

    def watched(z):
        points.append(np.asarray(z))
        fz = p.cell(p.params, jnp.asarray(z)[None], p.x)[0]
        return fz if name != "broyden" else z - fz

    given |= {"history_size": 10, "stepsize": 1.0} if name == "broyden" else {}
    solver = SOLVERS[name].method(watched, **given, jit=False)
    with jax.disable_jit():
        params, state = p.z0[0], solver.init_state(p.z0[0])
        for _ in range(steps):
            params, state = solver.update(params, state)
    # Anderson evaluates its start once more than it uses, for auxiliary outputs that are not there.
    want = points[1:] if name == "anderson" else points
    solution = solve(p, SOLVERS[name], rtol=0.0, max_steps=steps, history=lambda z: z)
    got = solution.history.record[:, 0]
    np.testing.assert_allclose(got, np.stack(want[:steps]), rtol=1e-9, atol=1e-11)
    assert solution.steps[0] == steps


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_gradients_are_implicit_ones(name):
    p = problems.tanh()

    def loss(solver):
        def of(params, x):
            return jnp.sum(jnp.sin(solve(p._replace(params=params, x=x), solver).value))

        return jax.jit(jax.grad(of, (0, 1)))(p.params, p.x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9),
        loss(SOLVERS[name]),
        loss(Picard()),
    )


def test_compaction():
    p = problems.conditioned((0.1, 0.5, 0.9, 0.2))
    solution = solve(p, SOLVERS["broyden"], compaction=1, rtol=1e-9)
    assert np.all(solution.converged)
    np.testing.assert_allclose(solution.value, p.answer, rtol=1e-7)


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_the_memory_of_another_solve_does_no_harm(name):
    """It is of no use either: jaxopt's state belongs to its own points."""
    p, solver = problems.conditioned(), SOLVERS[name]
    first = solver.init(p.z0)
    used = jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), first)
    fz = p.cell(p.params, p.z0, p.x)
    step = jax.jit(lambda memory: solver.step(p.z0, fz, memory, jnp.int32(0)))
    jax.tree.map(np.testing.assert_array_equal, step(used), step(first))


def test_unrolled_gradients():
    """Of a method that divides by what is zero where a finished problem stands still."""
    p = problems.linear(norm=0.4)

    def loss(params):
        p_ = p._replace(params=params)
        options = {"adjoint": Unrolled(), "max_steps": 25}
        return jnp.sum(solve(p_, SOLVERS["broyden"], **options).value ** 2)

    got = jax.grad(loss)(p.params)["W"]
    inverse = np.linalg.inv(np.eye(problems.N) - p.params["W"])
    want = 2 * (p.answer @ inverse).T @ p.answer
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_neighbours_change_nothing(name):
    """To the last bit, whether they finish before or after, or are not even numbers."""
    p = problems.conditioned((0.1, 0.5, 0.9))
    reference = solve(p, SOLVERS[name], rtol=1e-9, max_steps=60)
    for rate in (0.0, 1.7, jnp.nan):
        x = {**p.x, "rate": p.x["rate"].at[0].set(rate)}
        other = solve(p._replace(x=x), SOLVERS[name], rtol=1e-9, max_steps=60)
        for field in ("value", "steps", "residual", "result"):
            np.testing.assert_array_equal(
                getattr(other, field)[1:], getattr(reference, field)[1:], err_msg=field
            )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("anderson", jnp.float32), ("anderson", jnp.bfloat16), ("broyden", jnp.float32)],
)
def test_dtypes_are_kept_with_x64_on(name, dtype):
    p = problems.linear(norm=0.5)
    params, x, z0 = jax.tree.map(lambda v: v.astype(dtype), (p.params, p.x, p.z0))
    solution = solve(p._replace(params=params, x=x, z0=z0), SOLVERS[name], rtol=1e-2)
    assert solution.value.dtype == dtype
    assert np.all(solution.result == Result.converged)
    np.testing.assert_allclose(solution.value.astype(jnp.float64), p.answer, atol=0.05)


def test_options_hash_by_value():
    for solver in SOLVERS.values():
        assert isinstance(solver, Solver)
        twin = FromJaxopt(solver.method, solver.options)
        assert twin == solver
        assert hash(twin) == hash(solver)
    a = FromJaxopt(jaxopt.AndersonAcceleration, {"beta": 0.5, "history_size": 4})
    b = FromJaxopt(jaxopt.AndersonAcceleration, {"history_size": 4, "beta": 0.5})
    assert a == b
    assert a != FromJaxopt(jaxopt.AndersonAcceleration, {"history_size": 4})


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (jaxopt.LBFGS, {}, TypeError, r"method=.*LBFGS.* was given, but one of the classes"),
        ("Broyden", {}, TypeError, "method='Broyden' was given"),
        (jaxopt.AndersonAcceleration, {"tol": 1e-3}, ValueError, "tol=0.001 .* rtol and atol"),
        (jaxopt.Broyden, {"maxiter": 7}, ValueError, "maxiter=7 .* pass max_steps"),
        (jaxopt.Broyden, {"history": 7}, TypeError, "history=7 .* no such option; it takes step"),
        (jaxopt.FixedPointIteration, {"beta": 1}, TypeError, "no such option; it takes none"),
        (jaxopt.AndersonAcceleration, {"beta": [1]}, TypeError, "beta is a list, .* hashable"),
        (jaxopt.AndersonAcceleration, {"history_size": 1}, ValueError, "history_size"),
        (jaxopt.Broyden, {"stepsize": 0.0}, ValueError, "line search evaluates the map uncounted"),
    ],
)
def test_refusals(method, options, error, message):
    with pytest.raises(error, match=message):
        FromJaxopt(method, options)


def test_without_jaxopt_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxopt", None)
    with pytest.raises(ImportError, match="pip install jaxopt"):
        FromJaxopt(object)
