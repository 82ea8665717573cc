"""Group normalisation against its formula, with every kind of derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdeq.nn import GroupNorm, group_norm

EPSILON = 1e-5


def formula(x, scale, bias, groups=4):
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = ((grouped - mean) ** 2).mean((1, 3), keepdims=True)
    normed = (grouped - mean) / jnp.sqrt(variance + EPSILON)
    return normed.reshape(x.shape) * scale + bias


def ours(x, scale, bias, groups=4):
    return group_norm(x, scale, bias, groups=groups, epsilon=EPSILON)


def arguments(shape):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(3 + 2 * rng.normal(size=shape)),
        jnp.asarray(rng.normal(size=shape[-1])),
        jnp.asarray(rng.normal(size=shape[-1])),
    )


def agree(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


# Height 28 is summed in parts, height 17 (a prime above the limit of a part) row by row.
@pytest.mark.parametrize(
    "shape", [(2, 28, 3, 8), (2, 17, 2, 8), (3, 8), (2, 5, 8), (2, 2, 3, 2, 8)], ids=str
)
def test_values_and_derivatives(shape):
    values = arguments(shape)
    change = tuple(jnp.sin(a) for a in values)

    def everything(f):
        def loss(*a):
            return jnp.sum(jnp.sin(f(*a)))

        gradient = jax.grad(loss, (0, 1, 2))

        def of_gradient(*a):
            return sum(jnp.sum(jnp.cos(g)) for g in gradient(*a))

        return jax.jit(
            lambda: (
                f(*values),
                gradient(*values),
                jax.jvp(f, values, change),
                jax.jvp(gradient, values, change)[1],
                jax.grad(of_gradient, (0, 1, 2))(*values),
                jax.vmap(gradient, (0, None, None))(
                    jnp.stack([values[0], -values[0]]), *values[1:]
                ),
            )
        )()

    agree(everything(ours), everything(formula))


def test_hessian_in_both_orders_of_modes():
    values = arguments((1, 2, 2, 8))

    def loss(x):
        return jnp.sum(jnp.sin(ours(x, *values[1:])))

    want = jax.hessian(lambda x: jnp.sum(jnp.sin(formula(x, *values[1:]))))(values[0])
    agree(jax.jit(jax.jacfwd(jax.jacrev(loss)))(values[0]), want)
    agree(jax.jit(jax.jacrev(jax.jacrev(loss)))(values[0]), want)


def test_output_is_normalised():
    x, _, _ = arguments((2, 6, 5, 8))
    y = np.asarray(group_norm(x, jnp.ones(8), jnp.zeros(8), groups=2)).reshape(2, 30, 2, 4)
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(y.var((1, 3)), 1, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_a_constant_input_gives_the_bias_and_a_finite_gradient(value):
    scale, bias = jnp.ones(8, jnp.float32), jnp.arange(8, dtype=jnp.float32)
    x = jnp.full((2, 4, 4, 8), value, jnp.float32)
    np.testing.assert_array_equal(group_norm(x, scale, bias, groups=4)[0, 0, 0], bias)

    def loss(x):
        return jnp.sum(jnp.sin(group_norm(x, scale, bias, groups=4)))

    gradient, change = jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))
    assert jnp.isfinite(gradient).all()
    assert jnp.isfinite(change).all()


def test_a_mean_far_above_the_deviation_costs_no_accuracy_but_the_inputs():
    x, scale, bias = arguments((2, 8, 8, 8))
    shifted = jnp.float32(x) + jnp.float32(1000.0)
    got = group_norm(shifted, jnp.float32(scale), jnp.float32(bias), groups=4)
    want = formula(shifted.astype(np.float64), scale, bias)
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtypes_are_kept(dtype):
    x, scale, bias = (jnp.asarray(a, dtype) for a in arguments((2, 4, 4, 8)))
    gradients = jax.grad(lambda *a: jnp.sum(ours(*a) ** 2), (0, 1, 2))(x, scale, bias)
    assert {a.dtype.name for a in (ours(x, scale, bias), *gradients)} == {dtype}


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="4 groups for 6 channels"):
        GroupNorm(6, 4)
    with pytest.raises(ValueError, match="0 groups"):
        group_norm(jnp.zeros((1, 6)), jnp.ones(6), jnp.zeros(6), groups=0)


def test_module_without_affine_parameters():
    x, _, _ = arguments((2, 4, 4, 8))
    plain = GroupNorm(8, 4, affine=False)
    assert plain.scale is None
    agree(plain(x), formula(x, jnp.ones(8), jnp.zeros(8)))
    agree(GroupNorm(8, 4, initial_scale=0.5)(x), 0.5 * plain(x))
