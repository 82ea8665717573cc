"""Generators: a latent code x, its equilibrium z, and the image decoded from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdeq.nn import (
    Conv,
    GroupNorm,
    MultiscaleCell,
    bilinear_upsample,
    conv2d,
    limit_spectral_norm,
)
from jdeq.nn.conv import Precision
from jdeq.nn.multiscale import State

_USUAL = nnx.initializers.lecun_normal()

_DARKEST = 0.02
"""A sigmoid starts no nearer to 0 or 1 than this, where it would have no slope."""


def in_float32(z: Any) -> Any:
    """A state as decoders take it, at least in float32.

    The slope of the squared error in the state is a small difference of images: in bfloat16 it is
    off by several per cent, and with it the adjoint.
    """
    return jax.tree.map(lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32)), z)


def _starting_at(mean_image: Array | None) -> Callable[..., Array]:
    """The bias of a sigmoid that is ``mean_image``, or 1/2 for None."""
    if mean_image is None:
        return nnx.initializers.zeros_init()
    inside = jnp.clip(mean_image.reshape(-1), _DARKEST, 1 - _DARKEST)
    return lambda key, shape, dtype=jnp.float32: jax.scipy.special.logit(inside).astype(dtype)


class DenseGenerator(nnx.Module):
    """A fully connected equilibrium with a two-layer decoder.

        z* = tanh(W z* + U x + b),   image = sigmoid(V2 silu(V1 z* + c1) + c2)

    `contract`, to be called after every step on the parameters, keeps the spectral norm of W below
    `contraction`, so that the cell stays a contraction and has one equilibrium, which every solve
    finds. The decoder is smooth: behind a ReLU the gradient in x has kinks, on which no solve
    meets a tight tolerance.

    Attributes:
        latent_dim: dimension of x.
        image_shape: (height, width, channels) of an image.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        latent_dim: int,
        hidden: int,
        decoder_hidden: int,
        contraction: float,
        rngs: nnx.Rngs,
        mean_image: Array | None = None,
        state_dtype: Any = jnp.float32,
    ):
        """Initial parameters.

        Args:
            image_shape: (height, width, channels).
            latent_dim: dimension of the latent code, at least 1.
            hidden: width of the state, at least 1.
            decoder_hidden: width of the decoder's hidden layer, at least 1.
            contraction: bound on the spectral norm of W, in (0, 1).
            rngs: source of the parameters' keys.
            mean_image: what to decode at first, ``image_shape`` in [0, 1]; None is mid-grey.
                Backgrounds are far from grey, and Adam takes thousands of steps to move a bias
                that far.
            state_dtype: of states, and of the cell's products with them; all else is float32.
        """
        self.image_shape = image_shape
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.contraction = contraction
        self.state_dtype = state_dtype
        self.recurrent = nnx.Linear(
            hidden, hidden, kernel_init=_USUAL, dtype=state_dtype, rngs=rngs
        )
        self.injection = nnx.Linear(
            latent_dim, hidden, use_bias=False, kernel_init=_USUAL, rngs=rngs
        )
        self.features = nnx.Linear(hidden, decoder_hidden, kernel_init=_USUAL, rngs=rngs)
        self.pixels = nnx.Linear(
            decoder_hidden,
            math.prod(image_shape),
            kernel_init=_USUAL,
            bias_init=_starting_at(mean_image),
            rngs=rngs,
        )
        self.contract()

    def contract(self) -> None:
        """Scales W down to the bound on its norm."""
        kernel = self.recurrent.kernel
        kernel[...] = limit_spectral_norm(kernel[...], self.contraction)

    def cell(self, z: Array, x: Array) -> Array:
        """One step towards equilibrium.

        Args:
            z: state ``[B, hidden]``.
            x: latent codes ``[B, latent_dim]``.

        Returns:
            The next state, ``[B, hidden]``, entries in (-1, 1).
        """
        return jnp.tanh(self.recurrent(z) + self.injection(x)).astype(z.dtype)

    def decode(self, z: Array) -> Array:
        """Images ``[B, H, W, C]`` in [0, 1] of states ``[B, hidden]``."""
        pixels = jax.nn.sigmoid(self.pixels(jax.nn.silu(self.features(in_float32(z)))))
        return pixels.reshape(-1, *self.image_shape)

    def initial_state(self, batch: int) -> Array:
        """Zeros ``[batch, hidden]``."""
        return jnp.zeros((batch, self.hidden), self.state_dtype)


class MultiscaleGenerator(nnx.Module):
    """The paper's generator: a multiscale cell into which the latent code is mapped linearly.

        z* = cell(z*, V x + b),   image = (1 + tanh(output(z*))) / 2

    V x + b has the size of the whole state, each branch its part. With channels (32, 64, 128, 256),
    64x64x3 images and 128 latent dimensions it has the published 40,799,552 parameters. Ours are
    the range of the images, [0, 1] (published: [-1, 1]), and where training starts: b is random
    with unit variance, so that x = 0 with a state of zero is no point where the normalisations
    lack a derivative, and with it and `state_scale` the untrained cell is a contraction.

    Attributes:
        latent_dim: dimension of x.
        image_shape: (height, width, channels) of an image.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        latent_dim: int,
        channels: tuple[int, ...],
        output_width: int = 32,
        precision: Precision = None,
        rngs: nnx.Rngs,
        state_dtype: Any = jnp.float32,
    ):
        """Initial parameters.

        Args:
            image_shape: (height, width, channels).
            latent_dim: dimension of the latent code, at least 1.
            channels: channels of the cell's branches, finest first, each divisible by 8.
            output_width: channels before the image, divisible by 4.
            precision: of the convolutions' products, see `jdeq.nn.conv2d`.
            rngs: source of the parameters' keys.
            state_dtype: of states, and of the cell's convolutions; all else is float32, the
                statistics of its normalisations too.
        """
        self.image_shape = image_shape
        self.latent_dim = latent_dim
        self.state_dtype = state_dtype
        shared: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.multiscale = MultiscaleCell(channels, state_scale=0.5, **shared)
        shapes = self.multiscale.shapes(1, image_shape[:2])
        noise = nnx.initializers.normal(1.0)
        self.injections = nnx.List(
            [nnx.Linear(latent_dim, math.prod(s), bias_init=noise, **shared) for s in shapes]
        )
        self.output = ImageOutput(channels, output_width, image_shape[2], **shared)

    def cell(self, z: State, x: Array) -> State:
        """One step towards equilibrium.

        Args:
            z: state, one `[B, H_i, W_i, C_i]` a branch.
            x: latent codes `[B, latent_dim]`.

        Returns:
            The next state, of the same shapes.
        """
        parts = [
            linear(x).reshape(branch.shape)
            for linear, branch in zip(self.injections, z, strict=True)
        ]
        return self.multiscale(z, parts)

    def contract(self) -> None:
        """Nothing: the Jacobian penalty keeps this cell near a contraction."""

    def decode(self, z: State) -> Array:
        """Images `[B, H, W, C]` in [0, 1] of states."""
        return (1 + jnp.tanh(self.output(in_float32(z)))) / 2

    def initial_state(self, batch: int) -> State:
        """Zeros, one `[batch, H_i, W_i, C_i]` a branch."""
        return tuple(
            jnp.zeros(shape, self.state_dtype)
            for shape in self.multiscale.shapes(batch, self.image_shape[:2])
        )


class ImageOutput(nnx.Module):
    """State to image: branches upsampled to the finest, 1x1 convolution, three 3x3 convolutions.

    The published module convolves the upsampled and concatenated branches. Convolving each branch
    with its rows of the 1x1 kernel at its own resolution gives the same for a fraction of the
    work, since a 1x1 convolution and interpolation commute. The published transposed convolutions
    of stride 1 are convolutions.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        width: int,
        image_channels: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        shared: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.widths = widths
        self.mix = Conv(sum(widths), sum(widths), 1, use_bias=True, **shared)
        self.mix_norm = GroupNorm(sum(widths), 8)
        self.narrow = Conv(sum(widths), width, 3, use_bias=True, **shared)
        self.narrow_norm = GroupNorm(width, 4)
        self.refine = Conv(width, width, 3, **shared)
        self.refine_norm = GroupNorm(width, 4)
        self.image = Conv(width, image_channels, 3, **shared)

    def __call__(self, z: State) -> Array:
        """Maps a state to `[B, H, W, image_channels]`."""
        y = jax.nn.relu(self.mix_norm(self._mixed(z)))
        y = jax.nn.relu(self.narrow_norm(self.narrow(y)))
        y = jax.nn.relu(self.refine_norm(self.refine(y)))
        return self.image(y)

    def _mixed(self, z: State) -> Array:
        ends = list(accumulate(self.widths))
        kernels = jnp.split(self.mix.effective_kernel(), ends[:-1], axis=2)
        _, height, width, _ = z[0].shape
        parts = [
            bilinear_upsample(conv2d(branch, kernel, precision=self.mix.precision), (height, width))
            for branch, kernel in zip(z, kernels, strict=True)
        ]
        return self.mix.add_bias(sum(parts[1:], parts[0]))
