"""Group normalisation in two passes over the data, with exact derivatives of any order.

One pass sums each channel of `x` and of `x^2`, and one applies `a x + b` with `a` and `b` per
image and channel; the gradient is again one pass of sums (of the cotangent, and of it times `x`)
and one of an affine map. On XLA's CPU backend the sums of a pass are taken by one two-valued
reduction, a few rows at a time, which is several times as fast as the two reductions over all
pixels that automatic differentiation would write.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jdeq.nn._linear import Arrays, linear_map, on_cpu

# A reduction over more rows than LLVM unrolls is not vectorised: it takes 4 times as long.
MAX_UNROLLED_ROWS = 14


def group_norm(x: Array, scale: Array, bias: Array, *, groups: int, epsilon: float = 1e-5) -> Array:
    """Normalises groups of channels to mean 0 and variance 1, then scales and shifts.

    `y = (x - mean) / sqrt(var + epsilon) * scale + bias`, mean and (biased) variance over all
    pixels and the channels of one group of one image (Wu and He, 2018, eq. 1). A group that is
    constant is mapped to `bias`, with a finite gradient. Statistics are taken in float32 at least.

    Args:
        x: `[B, ..., C]`, any number of spatial axes.
        scale: `[C]`.
        bias: `[C]`.
        groups: number of groups of neighbouring channels; divides C.
        epsilon: added to the variance.

    Returns:
        `[B, ..., C]` in the dtype of `x`.

    Raises:
        ValueError: if `groups` does not divide C.
    """
    x = jnp.asarray(x)
    channels = x.shape[-1]
    check_groups(channels, groups)
    batch, size = x.shape[0], channels // groups
    wide = jnp.promote_types(x.dtype, jnp.float32)
    pixels = x if x.ndim == 4 else x.reshape(batch, -1, 1, channels)
    pixels = pixels.astype(wide)
    # Sums over groups and spreading over channels are products with this indicator matrix,
    # because XLA computes a product once, where it would repeat indexing at every pixel.
    member = jnp.repeat(jnp.eye(groups, dtype=wide), size, axis=1)
    # The statistics of x - origin are those of x, without the cancellation that a mean far above
    # the standard deviation would bring; a constant group becomes exactly zero.
    origin = lax.stop_gradient(pixels[:, 0, 0, ::size])
    centred = pixels - _product(origin, member)[:, None, None, :]
    total, squares = channel_sums(centred, centred)
    average = member.T / (size * pixels[0, ..., 0].size)
    mean, square = _product(total, average), _product(squares, average)
    # The maximum acts only where rounding made the difference negative.
    inverse = lax.rsqrt(jnp.maximum(square - mean * mean, 0) + epsilon)
    scales = member * scale.astype(wide)
    slope = _product(inverse, scales)
    offsets = jnp.concatenate([-(mean + origin) * inverse, jnp.ones((batch, 1), wide)], axis=1)
    shift = _product(offsets, jnp.concatenate([scales, bias.astype(wide)[None]]))
    return channel_affine(pixels, slope, shift).astype(x.dtype).reshape(x.shape)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def check_groups(channels: int, groups: int) -> None:
    """Refuses a number of groups that does not divide the channels."""
    if groups < 1 or channels % groups:
        raise ValueError(
            f"group normalisation got {groups} groups for {channels} channels: the number of "
            "groups must divide the number of channels; change one of them."
        )


@jax.custom_jvp
def channel_sums(x: Array, y: Array) -> tuple[Array, Array]:
    """Sums `y` and `x y`, both `[B, H, W, C]`, over pixels: two arrays `[B, C]`."""
    if not on_cpu():
        return jnp.sum(y, (1, 2)), jnp.sum(x * y, (1, 2))
    batch, height, width, channels = x.shape
    few = max(n for n in range(1, MAX_UNROLLED_ROWS + 1) if height % n == 0)
    split = (batch, height // few, few, width, channels)
    zero = jnp.zeros((), x.dtype)
    parts = lax.reduce(
        (y.reshape(split), (x * y).reshape(split)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        dimensions=(2,),
    )
    plain, weighted = (jnp.sum(part, (1, 2)) for part in parts)
    return plain, weighted


@channel_sums.defjvp
def _channel_sums_jvp(
    primals: Any, tangents: Any
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (x, y), (x_dot, y_dot) = primals, tangents
    plain, weighted = linear_map(_sums, _sums_transposed, [x], [y_dot])
    (by_x,) = linear_map(_weighted_sum, _weighted_sum_transposed, [y], [x_dot])
    return channel_sums(x, y), (plain, weighted + by_x)


@jax.custom_jvp
def channel_affine(x: Array, slope: Array, shift: Array) -> Array:
    """`slope x + shift` for `x` of `[B, H, W, C]`, slope and shift of `[B, C]`."""
    return x * slope[:, None, None, :] + shift[:, None, None, :]


@channel_affine.defjvp
def _channel_affine_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, slope, shift), (x_dot, slope_dot, shift_dot) = primals, tangents
    # Operands in the order of `_sums`' results, whose transpose this is.
    (by_coefficients,) = linear_map(_sums_transposed, _sums, [x], [shift_dot, slope_dot])
    by_x = x_dot * slope[:, None, None, :]
    return channel_affine(x, slope, shift), by_x + by_coefficients


def _sums(residuals: Arrays, operands: Arrays) -> Arrays:
    return channel_sums(residuals[0], operands[0])


def _sums_transposed(residuals: Arrays, cotangents: Arrays) -> Arrays:
    plain, weighted = cotangents
    return (channel_affine(residuals[0], weighted, plain),)


def _weighted_sum(residuals: Arrays, operands: Arrays) -> Arrays:
    return (channel_sums(residuals[0], operands[0])[1],)


def _weighted_sum_transposed(residuals: Arrays, cotangents: Arrays) -> Arrays:
    return (residuals[0] * cotangents[0][:, None, None, :],)


class GroupNorm(nnx.Module):
    """Group normalisation with a scale and a shift per channel; see `group_norm`.

    Args:
        features: channels C.
        groups: number of groups; divides C.
        epsilon: added to the variance.
        affine: whether there are a scale and a shift (initially 0).
        initial_scale: what the scale starts at.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: at construction, if `groups` does not divide `features`.
    """

    def __init__(
        self,
        features: int,
        groups: int,
        *,
        epsilon: float = 1e-5,
        affine: bool = True,
        initial_scale: float = 1.0,
        param_dtype: Any = jnp.float32,
    ):
        check_groups(features, groups)
        scale = jnp.full((features,), initial_scale, param_dtype)
        self.scale = nnx.Param(scale) if affine else None
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype)) if affine else None
        self.groups = groups
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        """Normalises `[B, ..., C]`."""
        channels = x.shape[-1:]
        scale = jnp.ones(channels, x.dtype) if self.scale is None else self.scale[...]
        bias = jnp.zeros(channels, x.dtype) if self.bias is None else self.bias[...]
        return group_norm(x, scale, bias, groups=self.groups, epsilon=self.epsilon)
