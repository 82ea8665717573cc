"""Convolutions against XLA's own: values, every kind of derivative, dtypes, weight norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jdeq.nn import Conv, conv2d, fold_weight_norm

# kernel size, stride, padding, image size, channels in and out
SHAPES = [
    (3, 1, None, 6, 3, 5),
    (3, 1, None, 5, 5, 3),
    (3, 2, None, 6, 5, 3),
    (3, 2, None, 7, 3, 4),
    (4, 2, 1, 8, 3, 2),
    (4, 1, None, 5, 2, 3),
    (1, 1, None, 4, 3, 4),
    (1, 2, None, 5, 4, 3),
    (5, 3, 0, 11, 2, 3),
    (3, 1, 3, 5, 3, 2),
]


def reference(x, kernel, *, stride, padding):
    padding = kernel.shape[0] // 2 if padding is None else padding
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def draw(shape, seed=0, dtype=np.float64):
    # A jax array: jit and vmap together refuse a numpy constant under custom_jvp (jax 0.10.2).
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(params=SHAPES, ids=str)
def case(request):
    size, stride, padding, image, c, o = request.param
    x = draw((2, image, image + 1, c))
    kernel = draw((size, size, c, o), 1)
    options = {"stride": stride, "padding": padding}
    return (
        lambda *a: conv2d(*a, **options),
        lambda *a: reference(*a, **options),
        x,
        kernel,
        (draw(x.shape, 2), draw(kernel.shape, 3)),
    )


def agree(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-9)


def scalar(f):
    return lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))


def test_values_and_first_derivatives(case):
    ours, theirs, x, kernel, change = case

    def everything(f):
        return jax.jit(
            lambda: (
                f(x, kernel),
                jax.grad(scalar(f), (0, 1))(x, kernel),
                jax.jvp(f, (x, kernel), change),
            )
        )()

    agree(everything(ours), everything(theirs))


def test_second_derivatives(case):
    ours, theirs, x, kernel, change = case

    def everything(f):
        gradient = jax.grad(scalar(f), (0, 1))

        def of_gradient(x, kernel):
            return sum(jnp.sum(jnp.cos(g)) for g in gradient(x, kernel))

        def of_change(x, kernel):
            return jax.jvp(scalar(f), (x, kernel), change)[1]

        return jax.jit(
            lambda: (
                jax.jvp(gradient, (x, kernel), change)[1],
                jax.grad(of_gradient, (0, 1))(x, kernel),
                jax.grad(of_change, (0, 1))(x, kernel),
            )
        )()

    agree(everything(ours), everything(theirs))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_vmap_of_all_modes(axes, stride):
    x, kernel = draw((3, 2, 5, 6, 3)), draw((3, 3, 3, 3, 4), 1)
    x = x if axes[0] == 0 else x[0]
    kernel = kernel if axes[1] == 0 else kernel[0]
    change = draw((2, 5, 6, 3), 2), draw((3, 3, 3, 4), 3)

    def everything(f):
        gradient = jax.grad(scalar(f), (0, 1))

        def hvp(x, kernel):
            return jax.jvp(gradient, (x, kernel), change)[1]

        return jax.jit(lambda: tuple(jax.vmap(g, axes)(x, kernel) for g in (f, gradient, hvp)))()

    agree(
        everything(lambda *a: conv2d(*a, stride=stride)),
        everything(lambda *a: reference(*a, stride=stride, padding=None)),
    )


def test_jacobians_in_both_modes():
    x, kernel = draw((1, 4, 4, 2)), draw((3, 3, 2, 2), 1)
    forward = jax.jit(jax.jacfwd(conv2d, (0, 1)))(x, kernel)
    reverse = jax.jit(jax.jacrev(conv2d, (0, 1)))(x, kernel)
    want = jax.jacrev(lambda *a: reference(*a, stride=1, padding=None), (0, 1))(x, kernel)
    agree(forward, want)
    agree(reverse, want)


def test_gradient_inside_a_loop_is_that_outside():
    x, kernel = draw((2, 6, 6, 3)), 0.1 * draw((3, 3, 3, 3), 1)

    def through(f):
        def loss(kernel):
            return jnp.sum(lax.scan(lambda z, _: (jnp.tanh(f(z, kernel)), None), x, None, 3)[0])

        return jax.jit(jax.grad(loss))(kernel)

    agree(through(conv2d), through(lambda *a: reference(*a, stride=1, padding=None)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtypes_are_kept(dtype):
    x = jnp.asarray(draw((2, 5, 5, 3)), dtype)
    kernel = jnp.asarray(draw((3, 3, 3, 4), 1), dtype)
    y = conv2d(x, kernel)
    gradients = jax.grad(lambda *a: jnp.sum(conv2d(*a) ** 2), (0, 1))(x, kernel)
    assert {a.dtype.name for a in (y, *gradients)} == {dtype}
    exact = reference(
        np.asarray(x, np.float64), np.asarray(kernel, np.float64), stride=1, padding=None
    )
    error = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.05}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=error, atol=10 * error)


def test_gradient_under_shard_map_sums_over_devices():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("batch",))
    spec = jax.sharding.PartitionSpec
    x, kernel = draw((2, 5, 5, 3)), draw((3, 3, 3, 2), 1)

    def loss(x, kernel):
        return jax.lax.psum(jnp.sum(conv2d(x, kernel) ** 2), "batch")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(spec("batch"), spec()), out_specs=spec())
    got = jax.jit(jax.grad(sharded, (0, 1)))(x, kernel)
    agree(got, jax.grad(lambda *a: jnp.sum(conv2d(*a) ** 2), (0, 1))(x, kernel))


@pytest.mark.parametrize(
    ("x", "kernel", "options"),
    [
        ((2, 5, 5, 3), (3, 3, 4, 2), {}),
        ((5, 5, 3), (3, 3, 3, 2), {}),
        ((2, 5, 5, 3), (3, 3, 2), {}),
        ((2, 5, 5, 3), (3, 3, 3, 2), {"stride": 0}),
        ((2, 5, 5, 3), (3, 3, 3, 2), {"padding": -1}),
    ],
)
def test_what_does_not_fit_is_refused(x, kernel, options):
    with pytest.raises(ValueError, match="conv2d got"):
        conv2d(jnp.zeros(x), jnp.zeros(kernel), **options)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="out_features=0"):
        Conv(3, 0, rngs=nnx.Rngs(0))


def test_weight_norm_is_a_reparametrisation_that_starts_at_the_plain_kernel():
    plain = Conv(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    normed = Conv(3, 4, weight_norm=True, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    x = draw((2, 5, 5, 3))
    np.testing.assert_allclose(normed(x), plain(x), rtol=1e-12)
    normed.kernel[...] = normed.kernel[...] * jnp.array([1.0, 2.0, 3.0, 0.5])
    np.testing.assert_allclose(normed(x), plain(x), rtol=1e-12)
    normed.gain[...] = 2 * normed.gain[...]
    np.testing.assert_allclose(normed(x), 2 * plain(x), rtol=1e-12)


def test_folding_weight_norm_keeps_values_and_gradients():
    layer = Conv(3, 4, weight_norm=True, use_bias=True, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    x = draw((2, 5, 5, 3))
    folded = fold_weight_norm(layer)
    assert folded.gain is None
    assert layer.gain is not None
    np.testing.assert_allclose(folded(x), layer(x), rtol=1e-12)
    want = nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))))(layer)
    got = nnx.grad(lambda m: jnp.sum(jnp.sin(fold_weight_norm(m)(x))))(layer)
    agree(got, want)
