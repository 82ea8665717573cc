"""The gradient of the iteration against finite differences of it, converged or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import Unrolled
from jdeq.solution import Result
from jdeq.solvers import Anderson, Broyden, Picard
from tests.jdeq import problems


def outer(value):
    return jnp.sum(jnp.sin(value) * (1 + jnp.arange(value.size).reshape(value.shape)))


@pytest.mark.parametrize("solver", [Picard(0.7), Anderson(), Anderson(kind="I"), Broyden()])
def test_is_the_derivative_of_an_unconverged_solve(solver):
    p = problems.tanh()
    options = {"solver": solver, "rtol": 0.0, "atol": 0.0, "max_steps": 6}

    @jax.jit
    def loss(W):
        s = jdeq.deq(p.cell, {**p.params, "W": W}, p.x, p.z0, adjoint=Unrolled(), **options)
        return outer(s.value)

    W = p.params["W"]
    direction = jnp.cos(jnp.arange(W.size, dtype=W.dtype)).reshape(W.shape)
    want = problems.central_difference(lambda t: loss(W + t * direction))
    got = jnp.vdot(jax.jit(jax.grad(loss))(W), direction)
    assert abs(got - want) <= 1e-7 * abs(want)
    # The implicit gradient is another one here.
    s = jdeq.deq(p.cell, p.params, p.x, p.z0, **options)
    assert np.all(s.result == Result.max_steps)


def gradient(p, **options):
    def loss(x):
        return outer(jdeq.deq(p.cell, p.params, x, p.z0, **options).value)

    return jax.jit(jax.grad(loss))(p.x)


def test_tends_to_the_implicit_gradient():
    p = problems.tanh(norm=0.5)
    options = {"solver": Picard(), "rtol": 1e-13, "atol": 0.0, "max_steps": 100}
    got = gradient(p, adjoint=Unrolled(), **options)
    np.testing.assert_allclose(got, gradient(p, **options), rtol=1e-9, atol=1e-11)


def test_each_problem_is_unrolled_as_far_as_it_went():
    """``z_k`` of ``z <- rate z + shift`` from zero is a polynomial in ``rate`` of degree k."""
    p = problems.conditioned((0.1, 0.5, 0.9))
    options = {"solver": Picard(), "rtol": 1e-3, "atol": 0.0, "max_steps": 200}

    def loss(x):
        s = jdeq.deq(p.cell, p.params, x, p.z0, adjoint=Unrolled(), **options)
        return jnp.sum(s.value), s.steps

    x_bar, steps = jax.grad(loss, has_aux=True)(p.x)
    assert len(set(np.asarray(steps))) == 3
    for i, k in enumerate(np.asarray(steps) - 1):
        rate, shift = float(p.x["rate"][i, 0]), np.asarray(p.x["shift"][i])
        powers = rate ** np.arange(k)
        np.testing.assert_allclose(x_bar["shift"][i], np.sum(powers), rtol=1e-9)
        slope = np.sum(np.arange(1, k) * rate ** np.arange(0, k - 1))
        np.testing.assert_allclose(x_bar["rate"][i, 0], slope * shift.sum(), rtol=1e-9)


def test_a_budget_shortens_it():
    p = problems.tanh()
    options = {"solver": Picard(), "rtol": 0.0, "atol": 0.0, "adjoint": Unrolled()}

    want = gradient(p, max_steps=5, **options)
    got = gradient(p, max_steps=30, step_budget=5, **options)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_failed_problem_contributes_zero():
    p = problems.conditioned((0.1, 0.5, 0.9))
    bad = {**p.x, "rate": p.x["rate"].at[1].set(1e200)}

    def loss(params, x):
        s = jdeq.deq(p.cell, params, x, p.z0, adjoint=Unrolled(), max_steps=50)
        return jnp.sum(s.value)

    _, want = jax.grad(loss, (0, 1))(p.params, p.x)
    params_bar, got = jax.grad(loss, (0, 1))(p.params, bad)
    assert jnp.isfinite(params_bar)
    for name in got:
        np.testing.assert_array_equal(got[name][1], 0)
        np.testing.assert_array_equal(got[name][jnp.array([0, 2])], want[name][jnp.array([0, 2])])
