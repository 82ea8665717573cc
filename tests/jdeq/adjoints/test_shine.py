"""SHINE: exact where the estimate is, biased elsewhere by what was measured here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import Implicit, JacobianFree, Shine
from jdeq.solvers import Anderson, Broyden, Picard
from tests.jdeq import problems

COTANGENT = np.random.default_rng(3).normal(size=(problems.B, problems.N))
TIGHT = {"rtol": 1e-13, "atol": 0.0, "max_steps": 100}


def inverse_of(solver, memory, row):
    """The estimate of ``(I - J)^{-1}`` of one problem, as a matrix."""
    rows = []
    for unit in np.eye(problems.N):
        v = jnp.zeros((problems.B, problems.N)).at[row].set(unit)
        rows.append(np.asarray(solver.transposed_inverse(memory, v))[row])
    return np.stack(rows)


def path(p, solver, steps):
    """The iterates, residuals and memories of a solve by hand."""
    z, memory, seen = p.z0, solver.init(p.z0), []
    for k in range(steps):
        fz = p.cell(p.params, z, p.x)
        seen.append((np.asarray(z), np.asarray(fz - z)))
        z_next, memory = solver.step(z, fz, memory, jnp.int32(k))
        z, last = z_next, memory
    return seen, np.asarray(z), last


@pytest.mark.parametrize("name", ["good", "bad", "II", "I"])
@pytest.mark.parametrize("window", [2, 5])
def test_the_estimate_is_the_one_that_made_the_step(name, window):
    """``z_{k+1} = z_k + H (f(z_k) - z_k)``, windows that were emptied or overwritten included."""
    kinds = {"good": Broyden(window, "good", 0.7), "bad": Broyden(window, "bad", 0.7),
             "II": Anderson(window, "II", 0.7), "I": Anderson(window, "I", 0.7)}  # fmt: skip
    solver, p = kinds[name], problems.tanh()
    for steps in (1, 4, 6):
        seen, z_next, memory = path(p, solver, steps)
        z, g = seen[-1]
        for row in range(problems.B):
            estimate = inverse_of(solver, memory, row)
            np.testing.assert_allclose(z[row] + estimate @ g[row], z_next[row], rtol=1e-7)
            if steps > 1:
                # The secant condition on the newest pair.
                y, s = g[row] - seen[-2][1][row], z[row] - seen[-2][0][row]
                np.testing.assert_allclose(estimate @ y, -s, rtol=1e-6, atol=1e-9)


def gradient(p, adjoint, solver, **options):
    def loss(x):
        options_ = {**TIGHT, **options}
        s = jdeq.deq(p.cell, p.params, x, p.z0, solver=solver, adjoint=adjoint, **options_)
        return jnp.sum(s.value * COTANGENT)

    return np.asarray(jax.jit(jax.grad(loss))(p.x))


def bias(p, solver, adjoint, **options):
    want = gradient(p, Implicit(rtol=1e-13, atol=0.0), Anderson())
    got = gradient(p, adjoint, solver, **options)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("kind", ["II", "I"])
def test_anderson_is_exact_on_a_linear_map_of_as_many_dimensions_as_slots(kind):
    """Broyden is not: each update undoes some of what the last ones knew."""
    p = problems.linear(norm=0.7)
    solver = Anderson(window=problems.N, kind=kind)
    assert bias(p, solver, JacobianFree()) > 0.3
    assert bias(p, solver, Shine(fallback=None), rtol=1e-9) < 1e-6
    broyden = bias(p, Broyden(window=30), Shine(fallback=None), rtol=1e-9)
    assert 0.05 < broyden < 0.3


@pytest.mark.parametrize(
    ("solver", "least"), [(Broyden(window=30), 0.12), (Anderson(window=5), 1e-3)]
)
def test_the_bias_of_a_nonlinear_cell(solver, least):
    """Below the Jacobian-free one's, less the tighter the solve, and removed by refinement."""
    p = problems.tanh(norm=0.8)
    plain = bias(p, solver, JacobianFree())
    loose, tight = (bias(p, solver, Shine(fallback=None), rtol=r) for r in (1e-1, 1e-12))
    assert tight < loose < plain
    assert tight < least
    assert bias(p, solver, Shine(None, refine=3), rtol=1e-4) < 0.01


def test_the_fallback_is_the_jacobian_free_gradient_problem_by_problem():
    p = problems.conditioned((0.1, 0.9, 0.95))

    def of(adjoint, x):
        s = jdeq.deq(p.cell, p.params, x, p.z0, solver=Broyden(), adjoint=adjoint, rtol=1e-9)
        return jnp.sum(s.value * p.x["shift"])

    bars = {
        a: np.asarray(jax.jit(jax.grad(functools.partial(of, a)))(p.x)["shift"])
        for a in (Shine(), Shine(fallback=None), Shine(fallback=0.0), JacobianFree())
    }
    free, trusted = bars[JacobianFree()], bars[Shine(fallback=None)]
    np.testing.assert_allclose(bars[Shine(fallback=0.0)], free, rtol=1e-12)
    np.testing.assert_allclose(trusted, p.x["shift"] / (1 - p.x["rate"]), rtol=1e-6)
    np.testing.assert_allclose(bars[Shine()][0], trusted[0], rtol=1e-12)
    np.testing.assert_allclose(bars[Shine()][1:], free[1:], rtol=1e-12)


def test_a_failed_problem_contributes_zero():
    p = problems.conditioned((0.1, 0.5, 0.9))
    bad = {**p.x, "rate": p.x["rate"].at[1].set(jnp.nan)}

    def loss(params, x):
        s = jdeq.deq(p.cell, params, x, p.z0, solver=Broyden(), adjoint=Shine())
        return jnp.sum(jnp.where(jnp.isfinite(s.value), s.value, 0))

    of = jax.jit(jax.grad(loss, (0, 1)))
    _, want = of(p.params, p.x)
    params_bar, got = of(p.params, bad)
    assert jnp.isfinite(params_bar)
    for name in got:
        np.testing.assert_array_equal(got[name][1], 0)
        np.testing.assert_array_equal(got[name][::2], want[name][::2])


def test_the_memory_is_returned_to_those_who_asked_and_refinement_can_be_probed():
    p = problems.linear(norm=0.7)
    solver = Broyden()
    options = {"solver": solver, "adjoint": Shine(refine=4), "rtol": 1e-9}
    assert jdeq.deq(p.cell, p.params, p.x, p.z0, **options).aux is None
    s = jdeq.deq(p.cell, p.params, p.x, p.z0, memory=solver.init(p.z0), **options)
    assert s.aux.memory.left.shape == (problems.B, 20, problems.N)

    def loss(probe):
        return jnp.sum(jdeq.deq(p.cell, p.params, p.x, p.z0, backward_probe=probe, **options).value)

    rows = jax.grad(loss)(jnp.zeros((problems.B, 3)))
    assert np.all((rows[:, 1] >= 1) & (rows[:, 1] <= 5))


def test_where_it_cannot_work_it_says_so():
    p = problems.linear()
    with pytest.raises(ValueError, match="keeps no estimate of an inverse Jacobian"):
        jdeq.deq(p.cell, p.params, p.x, p.z0, solver=Picard(), adjoint=Shine())
    with pytest.raises(ValueError, match="no backward solve that it could report"):
        jdeq.deq(p.cell, p.params, p.x, p.z0, adjoint=Shine(), backward_probe=jnp.zeros((3, 3)))
    for options in ({"fallback": -1.0}, {"refine": -1}):
        with pytest.raises(ValueError, match="Shine: "):
            Shine(**options)
