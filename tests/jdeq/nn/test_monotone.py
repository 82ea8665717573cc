"""Monotone cells: the bounds hold, plain iteration converges, one equilibrium, its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdeq
from jdeq.nn import DEQ, MonotoneCell
from jdeq.nn.monotone import _spectral_norm_bound
from jdeq.solvers import Anderson, NewtonKrylov, Picard
from tests.jdeq import problems

SPLITTINGS = ("forward_backward", "peaceman_rachford")
X = np.random.default_rng(0).normal(size=(4, 3))


def soft_threshold(v, step):
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - 0.1 * step, 0)


def clip(v, step):
    del step
    return jnp.clip(v, -0.5, 0.5)


def cell_of(splitting, *, scale=3.0, features=12, seed=0, **options):
    """A cell of large random weights."""
    cell = MonotoneCell(
        3, features, splitting=splitting, param_dtype=jnp.float64, rngs=nnx.Rngs(seed), **options
    )
    cell.symmetric[...] *= scale
    cell.skew[...] *= scale
    cell.bias[...] += 0.3
    return cell


def layer_of(cell, solver=None):
    return DEQ(cell, solver=solver or Picard(), rtol=1e-13, atol=0.0, max_steps=20000)


def plain_residual(cell, z, x):
    """How far `z` is from `prox(W z + U x + b)`, the equation without a splitting."""
    drive = z @ cell.weight().T + x @ cell.injection[...] + cell.bias[...]
    return np.max(np.abs(cell.prox(drive, jnp.ones(())) - z))


@pytest.mark.parametrize(("m", "scale"), [(0.05, 0.1), (0.05, 10.0), (3.0, 1.0)])
def test_the_weight_is_as_monotone_as_promised(m, scale):
    cell = cell_of("forward_backward", m=m, scale=scale, features=30)
    weight = np.asarray(cell.weight())
    symmetric = np.eye(30) - (weight + weight.T) / 2
    assert np.linalg.eigvalsh(symmetric)[0] >= m - 1e-10 * scale**2
    a, b = cell.symmetric[...], cell.skew[...]
    np.testing.assert_allclose(weight, (1 - m) * np.eye(30) - a.T @ a + b - b.T, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (40, 40), (7, 90)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_norm_bound_is_above_and_tight(shape, dtype):
    kernels = [jax.random.normal(jax.random.key(i), shape, dtype) for i in range(3)]
    kernels += [jnp.eye(*shape, dtype=dtype), 1e-4 * kernels[0], 1e4 * kernels[0]]
    for kernel in kernels:
        norm = np.linalg.norm(np.asarray(kernel, np.float64), 2)
        bound = float(_spectral_norm_bound(kernel))
        assert norm * (1 - 4 * jnp.finfo(dtype).eps) <= bound
        assert bound <= 1.03 * norm


@pytest.mark.parametrize("splitting", SPLITTINGS)
@pytest.mark.parametrize("alpha", [None, 0.02])
def test_a_step_contracts_by_the_bound(splitting, alpha):
    cell = cell_of(splitting, m=1.0, scale=1.0, alpha=alpha)
    bound = float(cell.contraction_bound())
    assert 0 < bound < 1
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 500, 12)) * rng.lognormal(size=(2, 500, 1))
    x = np.broadcast_to(X[:1], (500, 3))
    step = jax.jit(lambda state: cell(state, x))
    moved = np.linalg.norm(step(jnp.asarray(a)) - step(jnp.asarray(b)), axis=1)
    assert np.all(moved <= bound * np.linalg.norm(a - b, axis=1))


@pytest.mark.parametrize(
    ("splitting", "prox"), [(SPLITTINGS[0], None), (SPLITTINGS[1], None), (SPLITTINGS[1], clip)]
)
def test_picard_converges_where_the_plain_iteration_diverges(splitting, prox):
    options = {} if prox is None else {"prox": prox}
    cell = cell_of(splitting, m=1.0, **options)
    layer = layer_of(cell)
    solution = layer.solve(X)
    assert np.all(solution.result == jdeq.Result.converged)
    z = cell.output(solution.value)
    assert plain_residual(cell, z, X) < 1e-10

    def plain(params, z, x):
        return cell.prox(z @ params["W"].T + x @ params["U"] + params["b"], jnp.ones(()))

    params = {"W": cell.weight(), "U": cell.injection[...], "b": cell.bias[...]}
    naive = jdeq.deq(plain, params, X, z + 1e-3, solver=Picard(), rtol=1e-8, max_steps=500)
    assert not np.any(naive.result == jdeq.Result.converged)


@pytest.mark.parametrize("splitting", SPLITTINGS)
def test_the_equilibrium_is_unique(splitting):
    """What converges, from anywhere and with any solver, converges to the same state."""
    cell = cell_of(splitting, m=1.0, scale=1.5)
    output = jax.jit(cell.output)
    want = output(layer_of(cell)(X))
    start = 100 * jnp.asarray(np.random.default_rng(2).normal(size=want.shape))
    np.testing.assert_allclose(output(layer_of(cell)(X, start)), want, atol=1e-10)
    for solver in (Anderson(), NewtonKrylov()):
        solution = layer_of(cell, solver).solve(X)
        done = solution.converged
        assert np.all(done) or (splitting, type(solver)) == ("forward_backward", Anderson)
        np.testing.assert_allclose(output(solution.value)[done], want[done], atol=1e-9)


def test_both_splittings_and_every_step_have_the_same_equilibrium():
    """Also with an activation whose proximal operator depends on the step."""
    answers = [
        cell.output(layer_of(cell)(X))
        for cell in (
            cell_of(splitting, m=1.0, scale=1.0, alpha=alpha, prox=soft_threshold)
            for splitting, alpha in zip(
                (*SPLITTINGS, *SPLITTINGS), (None, None, 0.01, 0.3), strict=True
            )
        )
    ]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=1e-9)


@pytest.mark.parametrize("splitting", SPLITTINGS)
def test_gradients_are_those_of_the_equilibrium(splitting):
    cell = cell_of(splitting, m=1.0, scale=1.5, prox=soft_threshold)
    graph, params = nnx.split(cell)

    @jax.jit
    def loss(params, x):
        cell = nnx.merge(graph, params)
        return jnp.sum(jnp.sin(cell.output(layer_of(cell)(x))))

    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), (params, X))
    gradient = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(X))
    got = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))

    def along(t):
        return loss(*jax.tree.map(lambda v, d: v + t * d, (params, jnp.asarray(X)), direction))

    want = problems.central_difference(along, 1e-4)
    assert abs(got - want) <= 1e-7 * abs(want)


def test_it_is_a_cell_of_deq_and_keeps_dtypes():
    cell = MonotoneCell(3, 6, m=1.0, rngs=nnx.Rngs(0))
    graph, params = nnx.split(cell)
    x = jnp.asarray(X, jnp.float32)
    solution = jdeq.deq(
        lambda params, z, x: nnx.merge(graph, params)(z, x),
        params,
        x,
        cell.initial_state(4),
        max_steps=500,
    )
    assert solution.value.dtype == jnp.float32
    assert np.all(solution.result == jdeq.Result.converged)
    half = jax.eval_shape(lambda state: cell(state, x), jnp.zeros((4, 6), jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(DEQ(cell)(x), solution.value, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0.0}, "both must be above 0"),
        ({"alpha": -1.0}, "both must be above 0"),
        ({"splitting": "douglas"}, "'forward_backward' or 'peaceman_rachford'"),
        ({"features": 0}, "each must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MonotoneCell(3, options.pop("features", 4), rngs=nnx.Rngs(0), **options)
