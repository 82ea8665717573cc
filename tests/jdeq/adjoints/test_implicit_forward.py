"""Exact derivatives in forward mode, reverse mode, and mixtures of the two."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdeq
from jdeq.adjoints import Implicit, ImplicitForward
from jdeq.nn import MultiscaleCell
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems

TIGHT = {"solver": Picard(), "rtol": 1e-13, "atol": 0.0, "max_steps": 1000}


def outer(value):
    return jnp.sum(jnp.sin(value) * (1 + jnp.arange(value.size).reshape(value.shape)))


def loss(p, **options):
    def of(params, x):
        s = jdeq.deq(p.cell, params, x, p.z0, **{**TIGHT, "adjoint": ImplicitForward(), **options})
        return outer(s.value)

    return of


def test_jacobians_of_a_linear_equilibrium():
    p = problems.linear()

    def value(x):
        return jdeq.deq(
            p.cell, p.params, x[None], p.z0[:1], adjoint=ImplicitForward(), **TIGHT
        ).value[0]

    want = np.linalg.solve(np.eye(problems.N) - p.params["W"], p.params["U"])
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(value))(p.x[0]), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [Picard(0.8), Anderson()])
def test_jvp_and_grad_agree_with_finite_differences(solver):
    p = problems.tanh(norm=0.7)
    f = jax.jit(loss(p, solver=solver))
    direction = jax.tree.map(jnp.cos, (p.params, p.x))
    move = lambda t: jax.tree.map(lambda a, d: a + t * d, (p.params, p.x), direction)  # noqa: E731
    want = problems.central_difference(lambda t: f(*move(t)))
    _, forward = jax.jvp(f, (p.params, p.x), direction)
    gradient = jax.grad(f, (0, 1))(p.params, p.x)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    assert abs(forward - want) <= 1e-8 * abs(want)
    assert abs(sum(jnp.vdot(a, b) for a, b in pairs) - want) <= 1e-8 * abs(want)


def test_derivatives_of_all_orders_in_closed_form():
    p = problems.root()

    def z(x):
        s = jdeq.deq(
            p.cell, p.params, jnp.reshape(x, (1, 1)), jnp.ones((1, 1)),
            adjoint=ImplicitForward(), **TIGHT,
        )  # fmt: skip
        return s.value[0, 0]

    x, r = 2.0, 9.0
    for inner in (jax.jacfwd, jax.jacrev):
        for outside in (jax.jacfwd, jax.jacrev):
            np.testing.assert_allclose(jax.jit(outside(inner(z)))(x), -2 * r**-1.5, rtol=1e-9)
    third = jax.jacfwd(jax.jacfwd(jax.jacrev(z)))
    np.testing.assert_allclose(jax.jit(third)(x), 12 * r**-2.5, rtol=1e-8)


def test_hessian_under_vmap():
    p = problems.tanh(norm=0.5, batch=1)

    def of(x):
        return loss(p)(p.params, x)

    hessian = jax.jit(jax.hessian(of))
    points = jnp.stack([p.x, 2 * p.x])
    mapped = jax.jit(jax.vmap(jax.hessian(of)))(points)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], hessian(points[i]), rtol=1e-8, atol=1e-10)
    direction = jnp.sin(p.x)
    gradient = jax.jit(jax.grad(of))
    want = [
        problems.central_difference(lambda t, j=j: gradient(p.x + t * direction)[0, j])
        for j in range(problems.N)
    ]
    got = jnp.einsum("ijkl,kl->ij", hessian(p.x), direction)[0]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_failed_problem_contributes_zero():
    p = problems.conditioned((0.1, 0.5, 0.9))
    bad = {**p.x, "rate": p.x["rate"].at[1].set(jnp.nan)}

    def of(params, x):
        s = jdeq.deq(p.cell, params, x, p.z0, adjoint=ImplicitForward(), **TIGHT)
        return jnp.sum(jnp.where(jnp.isfinite(s.value), s.value, 0))

    _, want = jax.grad(of, (0, 1))(p.params, p.x)
    params_bar, got = jax.grad(of, (0, 1))(p.params, bad)
    assert jnp.isfinite(params_bar)
    for name in got:
        np.testing.assert_array_equal(got[name][1], 0)
        np.testing.assert_array_equal(got[name][jnp.array([0, 2])], want[name][jnp.array([0, 2])])


def test_a_probe_is_refused():
    p = problems.linear()
    with pytest.raises(ValueError, match="only custom_vjp can report"):
        jdeq.deq(
            p.cell, p.params, p.x, p.z0, adjoint=ImplicitForward(), backward_probe=jnp.zeros((3, 3))
        )


def test_a_state_only_part_of_which_is_driven():
    """Branches without an injection of their own do not depend on x directly."""
    p = problems.tanh(norm=0.5)

    def cell(params, z, x):
        driven, follower = z
        return p.cell(params, driven + 0.1 * follower, x), 0.5 * jnp.sin(driven)

    def loss(x, adjoint):
        options = {**TIGHT, "adjoint": adjoint}
        return outer(jdeq.deq(cell, p.params, x, (p.z0, p.z0), **options).value[0])

    def derivatives(adjoint):
        gradient = jax.grad(lambda x: loss(x, adjoint))
        curvature = jax.grad(lambda x: jnp.vdot(gradient(x), p.x))
        return jax.jit(lambda x: (gradient(x), curvature(x)))(p.x)

    for got, want in zip(derivatives(ImplicitForward()), derivatives(Implicit()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
    hessian = jax.jit(jax.jacfwd(jax.grad(lambda x: loss(x, ImplicitForward()))))(p.x)
    product = np.tensordot(hessian, p.x, 2)
    np.testing.assert_allclose(product, derivatives(Implicit())[1], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_convolutions_of_the_multiscale_cell():
    """Slope, gradient and Hessian-vector product against differences."""
    cell = MultiscaleCell((8, 8), expansion=1, state_scale=0.5, rngs=nnx.Rngs(0),
                          param_dtype=jnp.float64)  # fmt: skip
    graph, params = nnx.split(cell)
    rng = np.random.default_rng(0)
    x = tuple(jnp.array(rng.normal(size=s)) for s in cell.shapes(1, (4, 4)))
    directions = jax.tree.map(lambda v: jnp.array(rng.normal(size=v.shape)), (params, x))
    z0 = jax.tree.map(jnp.zeros_like, x)
    options = {"solver": Picard(), "rtol": 1e-13, "atol": 0.0, "max_steps": 300}

    def of(t):
        moved = jax.tree.map(lambda v, d: v + t[0] * d, params, directions[0])
        driven = jax.tree.map(lambda v, d: v + t[1] * d, x, directions[1])
        s = jdeq.deq(
            lambda params, z, x: nnx.merge(graph, params)(z, x), moved, driven, z0,
            adjoint=ImplicitForward(), **options,
        )  # fmt: skip
        return sum(outer(v) for v in s.value)

    along = jnp.array([1.0, 0.5])

    @jax.jit
    def derivatives(t):
        return jax.jvp(jax.value_and_grad(of), (t,), (along,))

    (_, gradient), (slope, curvature) = derivatives(jnp.zeros(2))
    np.testing.assert_allclose(slope, jnp.vdot(gradient, along), rtol=1e-10)
    # ReLUs have kinks: the differences must be narrow enough to meet none.
    want = problems.central_difference(lambda t: derivatives(t * along)[0][0], 1e-5)
    np.testing.assert_allclose(slope, want, rtol=1e-7)
    for i in range(2):
        want = problems.central_difference(lambda t, i=i: derivatives(t * along)[0][1][i], 1e-5)
        np.testing.assert_allclose(curvature[i], want, rtol=1e-6)
