"""Approximate gradients against their formulas on a linear equilibrium, and against the limit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import JacobianFree, Phantom
from jdeq.solvers import Picard
from tests.jdeq import problems

TIGHT = {"solver": Picard(), "rtol": 1e-13, "atol": 0.0, "max_steps": 1000}
COTANGENT = np.random.default_rng(3).normal(size=(problems.B, problems.N))


def gradient(p, adjoint, **options):
    def loss(params, x):
        s = jdeq.deq(p.cell, params, x, p.z0, adjoint=adjoint, **{**TIGHT, **options})
        return jnp.sum(s.value * COTANGENT)

    return jax.jit(jax.grad(loss, (0, 1)))(p.params, p.x)


def assert_is_pulled_back(p, got, u):
    """``got`` is ``u^T df/dtheta`` of the linear cell at its answer."""
    params_bar, x_bar = got
    np.testing.assert_allclose(params_bar["W"], u.T @ p.answer, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(params_bar["U"], u.T @ p.x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(x_bar, u @ p.params["U"], rtol=1e-9, atol=1e-12)


def test_the_one_step_gradient():
    p = problems.linear()
    assert_is_pulled_back(p, gradient(p, JacobianFree()), COTANGENT)


@pytest.mark.parametrize("kind", ["neumann", "unrolled"])
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (1, 0.3), (4, 0.5), (7, 1.0)])
def test_phantom_gradients_are_the_damped_neumann_sum(kind, steps, damping):
    p = problems.linear()
    matrix = (1 - damping) * np.eye(problems.N) + damping * np.asarray(p.params["W"]).T
    terms = [np.linalg.matrix_power(matrix, i) @ COTANGENT.T for i in range(steps)]
    got = gradient(p, Phantom(steps, damping, kind))
    assert_is_pulled_back(p, got, damping * np.sum(terms, axis=0).T)


@pytest.mark.parametrize("kind", ["neumann", "unrolled"])
def test_phantom_gradients_tend_to_the_exact_one(kind):
    p = problems.tanh(norm=0.5)
    exact = gradient(p, None)
    errors = []
    for steps in (5, 60):
        got = gradient(p, Phantom(steps, 1.0, kind))
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
        errors.append(max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs))
    assert errors[0] > 1e-4
    assert errors[1] < 1e-10


@pytest.mark.parametrize("adjoint", [JacobianFree(), Phantom(), Phantom(kind="unrolled")])
def test_a_failed_problem_contributes_zero(adjoint):
    p = problems.conditioned((0.1, 0.5, 0.9))
    bad = {**p.x, "rate": p.x["rate"].at[1].set(jnp.nan)}

    def loss(params, x):
        s = jdeq.deq(p.cell, params, x, p.z0, adjoint=adjoint, **TIGHT)
        return jnp.sum(jnp.where(jnp.isfinite(s.value), s.value, 0))

    _, want = jax.grad(loss, (0, 1))(p.params, p.x)
    params_bar, got = jax.grad(loss, (0, 1))(p.params, bad)
    assert jnp.isfinite(params_bar)
    for name in got:
        np.testing.assert_array_equal(got[name][1], 0)
        np.testing.assert_array_equal(got[name][jnp.array([0, 2])], want[name][jnp.array([0, 2])])


@pytest.mark.parametrize("adjoint", [JacobianFree(), Phantom()])
def test_a_probe_is_refused(adjoint):
    p = problems.linear()
    with pytest.raises(ValueError, match="no backward solve that it could report"):
        jdeq.deq(p.cell, p.params, p.x, p.z0, adjoint=adjoint, backward_probe=jnp.zeros((3, 3)))


@pytest.mark.parametrize("options", [{"steps": 0}, {"damping": 0.0}, {"kind": "other"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="Phantom: "):
        Phantom(**options)
