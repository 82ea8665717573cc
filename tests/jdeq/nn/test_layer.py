"""The equilibrium layer: values, gradients, training, no needless tracing, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jdeq
from jdeq.nn import DEQ, MultiscaleCell


class LinearCell(nnx.Module):
    """`z W + x U`, whose equilibrium is `x U (I - W)^-1`."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.w = nnx.Param(jnp.asarray(0.2 * rng.normal(size=(4, 4)) / 2))
        self.u = nnx.Param(jnp.asarray(rng.normal(size=(3, 4))))
        self.traces = 0

    def __call__(self, z, x):
        return z @ self.w[...] + x @ self.u[...]

    def initial_state(self, batch):
        return jnp.zeros((batch, 4))


X = np.random.default_rng(1).normal(size=(5, 3))


def closed_form(w, u, x):
    return x @ u @ jnp.linalg.inv(jnp.eye(4) - w)


def test_value_and_gradients_are_the_equilibriums():
    layer = DEQ(LinearCell(), rtol=1e-13, atol=0.0)
    w, u = layer.cell.w[...], layer.cell.u[...]
    np.testing.assert_allclose(layer(X), closed_form(w, u, X), rtol=1e-10)
    got = nnx.grad(lambda m: jnp.sum(jnp.sin(m(X))))(layer)
    want = jax.grad(lambda w, u: jnp.sum(jnp.sin(closed_form(w, u, X))), (0, 1))(w, u)
    np.testing.assert_allclose(got["cell"]["w"][...], want[0], rtol=1e-8)
    np.testing.assert_allclose(got["cell"]["u"][...], want[1], rtol=1e-8)
    by_x = jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(X)
    np.testing.assert_allclose(
        by_x, jax.grad(lambda x: jnp.sum(jnp.sin(closed_form(w, u, x))))(X), rtol=1e-8
    )


def test_a_start_may_be_given_and_the_solution_had():
    layer = DEQ(LinearCell())
    z = layer(X)
    solution = layer.solve(X, z)
    assert (np.asarray(solution.steps) <= 1).all()
    assert (np.asarray(solution.result) == int(jdeq.Result.converged)).all()


def test_training_in_jit_lowers_the_loss():
    layer = DEQ(LinearCell())
    optimizer = nnx.Optimizer(layer, optax.adam(0.01), wrt=nnx.Param)
    target = jnp.asarray(np.random.default_rng(2).normal(size=(5, 4)))

    @nnx.jit
    def step(layer, optimizer):
        loss, gradient = nnx.value_and_grad(lambda m: jnp.mean((m(X) - target) ** 2))(layer)
        optimizer.update(layer, gradient)
        return loss

    losses = [float(step(layer, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_second_call_is_not_traced_again():
    calls = []

    class Counting(LinearCell):
        def __call__(self, z, x):
            calls.append(None)
            return super().__call__(z, x)

    layer = DEQ(Counting())
    layer(X)
    before = len(calls)
    layer(X + 1)
    assert len(calls) == before


def test_a_multiscale_cell_fits():
    class Cell(nnx.Module):
        def __init__(self):
            self.multiscale = MultiscaleCell((8, 8), expansion=2, state_scale=0.5, rngs=nnx.Rngs(0))

        def __call__(self, z, x, masks):
            return self.multiscale(z, [x, None], masks)

        def initial_state(self, batch):
            return tuple(jnp.zeros(s, jnp.float32) for s in self.multiscale.shapes(batch, (4, 4)))

    layer = DEQ(Cell(), rtol=1e-4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 8)), jnp.float32)
    masks = (jnp.ones((2, 8), jnp.float32), None)
    z = layer(x, data=masks)
    assert [a.shape for a in z] == [(2, 4, 4, 8), (2, 2, 2, 8)]


def test_a_cell_that_draws_is_refused():
    with pytest.raises(TypeError, match="draws random numbers"):
        DEQ(nnx.Dropout(0.1, rngs=nnx.Rngs(0)))


def test_a_start_is_needed():
    class Bare(nnx.Module):
        def __call__(self, z, x):
            return 0.5 * z + x

    with pytest.raises(ValueError, match="has no initial_state"):
        DEQ(Bare())(X)
    np.testing.assert_allclose(DEQ(Bare())(X, jnp.zeros_like(X)), 2 * X, rtol=1e-4)
