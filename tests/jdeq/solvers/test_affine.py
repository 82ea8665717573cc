"""GMRES and BiCGStab: linear equations behind gradients, solved exactly, contraction or not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import Implicit, ImplicitForward, Unrolled
from jdeq.solution import Result
from jdeq.solvers import GMRES, BiCGStab, Picard
from tests.jdeq import problems

SOLVERS = [GMRES(), GMRES(dimension=3), BiCGStab()]
# Forward solves start at the answer, so that Picard, which compiles fastest, has nothing to do.
TIGHT = {"rtol": 1e-13, "atol": 0.0, "max_steps": 500}
COTANGENT = np.random.default_rng(3).normal(size=(problems.B, problems.N))


def stretched(condition, seed=0):
    """``z = W z + U x`` with ``I - W`` of a condition number, and ``W`` no contraction."""
    p = problems.linear(seed)
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(problems.N, problems.N)))
    right, _ = np.linalg.qr(rng.normal(size=(problems.N, problems.N)))
    values = np.geomspace(1, 1 / condition, problems.N)
    W = np.eye(problems.N) - 4 * left @ np.diag(values) @ right
    answer = np.linalg.solve(np.eye(problems.N) - W, np.asarray(p.x @ p.params["U"].T).T).T
    return p._replace(params={**p.params, "W": jnp.array(W)}, answer=answer)


PROBLEMS = {
    "contraction": lambda: problems.linear(norm=0.9),
    "expansion": lambda: problems.linear(norm=3.0),
    "condition": lambda: stretched(1e4),
}


def loss(p, adjoint, params, x):
    z0 = jnp.asarray(p.answer)
    s = jdeq.deq(p.cell, params, x, z0, solver=Picard(), adjoint=adjoint, **TIGHT)
    return jnp.sum(s.value * COTANGENT)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("solver", [GMRES(), BiCGStab()])
@pytest.mark.parametrize("kind", [Implicit, ImplicitForward])
def test_the_gradient_of_a_linear_equilibrium_in_closed_form(kind, solver, name):
    p = PROBLEMS[name]()
    W = np.asarray(p.params["W"])
    if name != "contraction":
        assert np.max(np.abs(np.linalg.eigvals(W))) > 1
    got = jax.jit(jax.grad(functools.partial(loss, p, kind(solver)), (0, 1)))(p.params, p.x)
    u = np.linalg.solve((np.eye(problems.N) - W).T, COTANGENT.T).T
    assert problems.relative_error(got[1], u @ p.params["U"]) < 1e-8
    assert problems.relative_error(got[0]["W"], u.T @ p.answer) < 1e-8


def test_restarts_reach_the_solution_too():
    p = PROBLEMS["contraction"]()
    want = np.linalg.solve((np.eye(problems.N) - p.params["W"]).T, COTANGENT.T).T @ p.params["U"]
    for solver in (GMRES(dimension=2), BiCGStab(iterations=2)):
        got = jax.jit(jax.grad(functools.partial(loss, p, Implicit(solver)), 1))(p.params, p.x)
        assert problems.relative_error(got, want) < 1e-9


@pytest.mark.parametrize("solver", [GMRES(), BiCGStab()])
def test_under_jit_and_vmap(solver):
    p = problems.tanh()
    gradient = jax.grad(functools.partial(loss, p, Implicit(solver)), 1)
    several = jnp.stack([p.x, 0.5 * p.x])
    mapped = jax.jit(jax.vmap(gradient, (None, 0)))(p.params, several)
    reference = jax.jit(jax.grad(functools.partial(loss, p, Implicit()), 1))
    for i in range(2):
        np.testing.assert_allclose(mapped[i], reference(p.params, several[i]), rtol=1e-9)


@pytest.mark.parametrize("solver", [GMRES(), BiCGStab()])
@pytest.mark.parametrize("adjoint", [Implicit, ImplicitForward])
def test_second_derivatives_in_closed_form(adjoint, solver):
    """``z = sqrt(z + x)`` has ``z'' = -2 (1 + 4 x)^(-3/2)``."""
    p = problems.root()

    def z(x):
        options = {"solver": Picard(), "adjoint": adjoint(solver), **TIGHT}
        return jdeq.deq(p.cell, p.params, x.reshape(1, 1), jnp.ones((1, 1)), **options).value[0, 0]

    got = jax.jit(jax.grad(jax.grad(z)))(jnp.array(2.0))
    np.testing.assert_allclose(got, -2 * 9.0**-1.5, rtol=1e-9)


def test_evaluations_are_counted_problem_by_problem():
    """As many products as there are eigenvalues, and the measuring before and after."""
    rate = jnp.array([[0.5] * 5, [0.5, -3.0, 0.2, 0.5, 0.2], [0.0] * 5])
    x, z0 = {"rate": rate, "shift": jnp.ones((3, 5))}, jnp.ones((3, 5))
    s = jdeq.deq(problems.rate_cell, jnp.ones(()), x, z0, solver=GMRES(), **TIGHT)
    # The third problem starts at its solution.
    np.testing.assert_array_equal(s.steps, [1 + 1 + 1, 1 + 3 + 1, 1])
    assert np.all(s.converged)
    # BiCGStab solves a multiple of the identity by its first half step, and counts both products.
    s = jdeq.deq(problems.rate_cell, jnp.ones(()), x, z0, solver=BiCGStab(), **TIGHT)
    np.testing.assert_array_equal(s.steps[::2], [1 + 2 + 1, 1])
    assert np.all(s.converged)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_nonlinear_map_is_never_solved_wrongly(solver):
    """Its true residual is measured: what is not a fixed point is not called one."""
    z0 = jnp.array([[1.0, 0.3], [0.5, 2.0], [3.0, -1.0]])

    def f(_, z):
        return jnp.cos(3 * z) + 0.5 * jnp.roll(z, 1, axis=1)

    s = jdeq.fixed_point(f, None, z0, solver=solver, rtol=1e-8, atol=0.0, max_steps=60)
    true = np.linalg.norm(np.asarray(f(None, s.value) - s.value), axis=1)
    np.testing.assert_allclose(s.residual, true, rtol=1e-6, atol=1e-12)
    assert not np.any(s.converged & (true > 1e-8 * np.linalg.norm(f(None, s.value), axis=1)))
    assert not np.all(s.converged)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_bad_problem_harms_nobody(solver):
    p = problems.linear(norm=3.0)
    x = p.x.at[1].set(jnp.nan)
    options = {"solver": solver, **TIGHT, "rtol": 1e-9, "max_steps": 40}
    s = jdeq.deq(p.cell, p.params, x, p.z0, **options)
    reference = jdeq.deq(p.cell, p.params, p.x, p.z0, **options)
    assert s.result[1] == Result.non_finite
    for field in ("value", "result", "steps"):
        np.testing.assert_array_equal(getattr(s, field)[::2], getattr(reference, field)[::2])


def test_a_skew_system_breaks_bicgstab_down_and_is_reported():
    """``I - A`` a rotation by 90 degrees: every stabilising step is zero. GMRES solves it."""

    def f(b, z):
        turned = jnp.stack([-z[:, 1], z[:, 0]], axis=1)
        return z - turned + b

    b, z0 = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.zeros((2, 2))
    s = jdeq.fixed_point(f, b, z0, solver=BiCGStab(), max_steps=100)
    assert np.all(s.result == Result.stagnated)
    solved = jdeq.fixed_point(f, b, z0, solver=GMRES())
    assert np.all(solved.converged)
    np.testing.assert_allclose(solved.value, [[2.0, -1.0], [-1.0, -3.0]], atol=1e-12)


def test_float32_and_bfloat16_are_kept():
    p = problems.linear(norm=0.9)
    for dtype, rtol in ((jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)):
        arguments = jax.tree.map(lambda v, d=dtype: v.astype(d), (p.params, p.x, p.z0))
        for solver in (GMRES(), BiCGStab()):
            s = jdeq.deq(p.cell, *arguments, solver=solver, rtol=rtol, atol=0.0)
            assert s.value.dtype == dtype
            assert np.all(s.converged)
            assert problems.relative_error(s.value.astype(jnp.float64), p.answer) < 30 * rtol


@pytest.mark.parametrize("solver", [GMRES(), BiCGStab()])
def test_a_step_without_the_map_is_refused(solver):
    p = problems.linear()
    name = type(solver).__name__
    with pytest.raises(ValueError, match=f"{name}: it was asked for a step without the map"):
        jax.grad(
            lambda x: jnp.sum(
                jdeq.deq(p.cell, p.params, x, p.z0, solver=solver, adjoint=Unrolled()).value
            )
        )(p.x)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GMRES, {"dimension": 0}),
        (GMRES, {"reduction": 0.0}),
        (BiCGStab, {"iterations": 0}),
        (BiCGStab, {"reduction": 2.0}),
    ],
)
def test_options_out_of_range_are_refused(kind, options):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {next(iter(options))}="):
        kind(**options)
