"""Two-dimensional convolutions that stay fast inside loops, with all their derivatives.

An equilibrium solve is a loop, and XLA's CPU backend has a fast routine for a convolution only
when it reads NHWC images with an HWIO kernel. The gradients that automatic differentiation writes
have swapped kernel axes, which inside a loop are not put back: there the gradient in the input
takes 6 to 25 times as long as the convolution itself, and the gradient in the kernel 50 times.
Here both transposes are written in forms that are fast everywhere:

- in the input: an ordinary convolution with the kernel flipped and its channel axes swapped, the
  cotangent dilated beforehand where the stride is above one;
- in the kernel: one matrix product for each kernel position.

On other backends the plain convolution and its usual derivatives are used.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jdeq.nn._linear import Arrays, linear_map, on_cpu

Padding = tuple[tuple[int, int], tuple[int, int]]
Precision = str | lax.Precision | None
M = TypeVar("M", bound=nnx.Module)


def conv2d(
    x: Array,
    kernel: Array,
    *,
    stride: int = 1,
    padding: int | None = None,
    precision: Precision = None,
) -> Array:
    """Convolves images with a kernel (cross-correlation, as usual in deep learning).

    `y[b, i, j, o] = sum_{p, q, c} x[b, s i + p - pad, s j + q - pad, c] kernel[p, q, c, o]`, with
    zeros outside the image. Differentiable any number of times in both modes.

    Args:
        x: images, `[B, H, W, C]`.
        kernel: `[kernel height, kernel width, C, O]`.
        stride: distance of neighbouring outputs, in pixels.
        padding: zeros added on each side; half the kernel size (rounded down) when None, so that
            odd kernels at stride 1 keep the image size.
        precision: of the products; `'highest'` is float32 also where the device would choose
            TF32 or bfloat16.

    Returns:
        `[B, H', W', O]` with `H' = (H + 2 padding - kernel height) // stride + 1`, in the common
        dtype of `x` and `kernel`.

    Raises:
        ValueError: on shapes that do not fit together, or `stride < 1`.
    """
    _check(x, kernel, stride, padding)
    dtype = jnp.result_type(x, kernel)
    halves = tuple(k // 2 if padding is None else padding for k in kernel.shape[:2])
    pads = ((halves[0], halves[0]), (halves[1], halves[1]))
    convolve = _conv if on_cpu() else _plain_conv
    return convolve(jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), stride, pads, precision)


def _check(x: Array, kernel: Array, stride: int, padding: int | None) -> None:
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"conv2d got images of shape {x.shape} and a kernel of shape {kernel.shape}: expected "
            "[B, H, W, C] and [kernel height, kernel width, C, O] with the same C; reshape one."
        )
    if stride < 1 or (padding is not None and padding < 0):
        raise ValueError(
            f"conv2d got stride={stride} and padding={padding}: give a stride of 1 or more and a "
            "padding of 0 or more."
        )


def _plain_conv(x: Array, kernel: Array, stride: int, pads: Padding, precision: Precision) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


_conv = jax.custom_jvp(_plain_conv, nondiff_argnums=(2, 3, 4))


@_conv.defjvp
def _conv_jvp(
    stride: int, pads: Padding, precision: Precision, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    x, kernel = primals
    x_dot, kernel_dot = tangents
    options: dict[str, Any] = {"stride": stride, "pads": pads, "precision": precision}

    def in_x(residuals: Arrays, operands: Arrays) -> Arrays:
        return (_conv(operands[0], residuals[0], stride, pads, precision),)

    def to_x(residuals: Arrays, cotangents: Arrays) -> Arrays:
        return (_input_gradient(cotangents[0], residuals[0], x.shape[1:3], **options),)

    def in_kernel(residuals: Arrays, operands: Arrays) -> Arrays:
        return (_conv(residuals[0], operands[0], stride, pads, precision),)

    def to_kernel(residuals: Arrays, cotangents: Arrays) -> Arrays:
        return (_kernel_gradient(residuals[0], cotangents[0], kernel.shape[:2], **options),)

    (by_x,) = linear_map(in_x, to_x, [kernel], [x_dot])
    (by_kernel,) = linear_map(in_kernel, to_kernel, [x], [kernel_dot])
    return _conv(x, kernel, stride, pads, precision), by_x + by_kernel


def _input_gradient(
    y_bar: Array,
    kernel: Array,
    size: tuple[int, int],
    *,
    stride: int,
    pads: Padding,
    precision: Precision,
) -> Array:
    """Gradient in the images, `[B, *size, C]`: a convolution of the dilated cotangent."""
    spread = [
        (k - 1 - low, n - 1 + low - stride * (m - 1), stride - 1)
        for k, n, m, (low, _) in zip(kernel.shape[:2], size, y_bar.shape[1:3], pads, strict=True)
    ]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    if stride == 1 and all(low >= 0 and high >= 0 for low, high, _ in spread):
        around = tuple((low, high) for low, high, _ in spread)
        return _conv(y_bar, flipped, 1, around, precision)
    zero = jnp.zeros((), y_bar.dtype)
    dilated = lax.pad(y_bar, zero, [(0, 0, 0), *spread, (0, 0, 0)])
    return _conv(dilated, flipped, 1, ((0, 0), (0, 0)), precision)


def _kernel_gradient(
    x: Array,
    y_bar: Array,
    window: tuple[int, int],
    *,
    stride: int,
    pads: Padding,
    precision: Precision,
) -> Array:
    """Gradient in the kernel, `[*window, C, O]`: a matrix product for each kernel position.

    The narrower of the two arrays is the one that is shifted and so copied, where the stride
    leaves the choice.
    """
    shift_output = stride == 1 and y_bar.shape[3] < x.shape[3]
    zero = jnp.zeros((), x.dtype)
    if shift_output:
        around = [(k - 1 - lo, k - 1 - hi, 0) for k, (lo, hi) in zip(window, pads, strict=True)]
        padded = lax.pad(y_bar, zero, [(0, 0, 0), *around, (0, 0, 0)])
        extent = x.shape[1:3]
    else:
        padded = lax.pad(x, zero, [(0, 0, 0), *((lo, hi, 0) for lo, hi in pads), (0, 0, 0)])
        extent = y_bar.shape[1:3]

    def at(row: int, column: int) -> Array:
        if shift_output:
            row, column = window[0] - 1 - row, window[1] - 1 - column
        ends = [o + stride * (n - 1) + 1 for o, n in zip((row, column), extent, strict=True)]
        part = padded[:, row : ends[0] : stride, column : ends[1] : stride]
        left, right = (x, part) if shift_output else (part, y_bar)
        return lax.dot_general(
            left,
            right,
            (((0, 1, 2), (0, 1, 2)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )

    rows = [jnp.stack([at(i, j) for j in range(window[1])]) for i in range(window[0])]
    return jnp.stack(rows).astype(x.dtype)


class Conv(nnx.Module):
    """Convolution layer, NHWC, padded by half the kernel size, optionally weight-normalised.

    With weight norm the kernel is `gain[o] v[..., o] / ||v[..., o]||` (Salimans and Kingma, 2016,
    eq. 2), the norm over all axes but the output channel's. The gain starts at `||v||`, so that
    the layer starts as it would without.

    Args:
        in_features: channels C of the images.
        out_features: channels O of the result.
        kernel_size: height and width of the kernel.
        stride: distance of neighbouring outputs, in pixels.
        weight_norm: whether to normalise the kernel; adds `out_features` parameters.
        use_bias: whether to add a bias per output channel.
        precision: see `conv2d`.
        kernel_init: initialiser of the kernel `[k, k, C, O]`; LeCun normal by default.
        param_dtype: dtype of the parameters.
        rngs: source of the parameters' key.

    Raises:
        ValueError: at construction, if a size is below one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        weight_norm: bool = False,
        use_bias: bool = False,
        precision: Precision = None,
        kernel_init: nnx.initializers.Initializer | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(in_features, out_features, kernel_size, stride) < 1:
            raise ValueError(
                f"Conv got in_features={in_features}, out_features={out_features}, "
                f"kernel_size={kernel_size}, stride={stride}: each must be at least 1."
            )
        init = kernel_init or nnx.initializers.lecun_normal()
        shape = (kernel_size, kernel_size, in_features, out_features)
        kernel = init(rngs.params(), shape, param_dtype)
        self.kernel = nnx.Param(kernel)
        self.gain = nnx.Param(_channel_norms(kernel)) if weight_norm else None
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        self.stride = stride
        self.precision = precision

    def effective_kernel(self) -> Array:
        """The kernel `[k, k, C, O]` that is convolved with, weight norm applied."""
        if self.gain is None:
            return self.kernel[...]
        kernel = self.kernel[...]
        return kernel * (self.gain[...] / _channel_norms(kernel))

    def __call__(self, x: Array) -> Array:
        """Maps images `[B, H, W, C]` to `[B, H', W', O]` in the images' dtype."""
        kernel = self.effective_kernel().astype(x.dtype)
        return self.add_bias(conv2d(x, kernel, stride=self.stride, precision=self.precision))

    def add_bias(self, y: Array) -> Array:
        """Adds the bias, if there is one, to `[B, H', W', O]`."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _channel_norms(kernel: Array) -> Array:
    return jnp.sqrt(jnp.sum(kernel * kernel, axis=(0, 1, 2)))


def fold_weight_norm(module: M) -> M:
    """A copy of a module whose convolutions hold their effective kernels and no gains.

    It computes the same function. Solve with the copy where the normalisation of large kernels
    in every iteration would cost; gradients pass through to the original's parameters.
    """
    folded = nnx.clone(module)
    for _, part in nnx.iter_graph(folded):
        if isinstance(part, Conv):
            part.kernel = nnx.Param(part.effective_kernel())
            part.gain = None
    return folded
