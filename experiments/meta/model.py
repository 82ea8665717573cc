"""Equilibrium networks whose cell a context vector modulates, one context a task.

States hold the examples of a task on their second axis, [B, n, ...]. What an example adds to the
cell, its injection, does not change during a solve and is computed once, outside of it.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdeq.nn import Conv, GroupNorm, MultiscaleCell, conv2d, limit_spectral_norm

PyTree = Any

_MODULATION = 0.25  # by how much a context can scale what the state feeds back
_POWER_ITERATIONS = 15


class Network(Protocol):
    """What the task needs of a network."""

    def inject(self, inputs: Array) -> PyTree:
        """What examples [M, ...] add to the cell, every leaf [M, ...]."""

    def cell(self, z: PyTree, context: Array, injection: PyTree) -> PyTree:
        """The next state, leaves [B, n, ...], for contexts [B, c] and injections [B, n, ...]."""

    def features(self, z: PyTree) -> Array:
        """What the classifier sees of a state: [B, n, D]."""

    def initial_state(self, tasks: int, examples: int) -> PyTree:
        """Zeros, every leaf [tasks, examples, ...]."""

    def contract(self) -> None:
        """Scales the cell down to a contraction, where it is kept one by construction."""


class Modulation(nnx.Module):
    """Feature-wise scale and shift by a context (FiLM; Perez et al., 2018).

    The scale, `1 + tanh(S v) / 4`, is bounded, so that a contraction stays one for every context.
    `contract` bounds the linear maps themselves, so that no training makes the problem of finding
    the context steep.
    """

    def __init__(self, context: int, width: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(context, 2 * width, use_bias=False, rngs=rngs)

    def __call__(self, context: Array) -> tuple[Array, Array]:
        """(scale, shift), [B, width] each, of contexts [B, c]."""
        scale, shift = jnp.split(self.linear(context), 2, axis=-1)
        return 1 + _MODULATION * jnp.tanh(scale), shift

    def contract(self) -> None:
        """Scales the maps down to a spectral norm of at most 1."""
        kernel = self.linear.kernel
        kernel[...] = limit_spectral_norm(kernel[...], 1.0)


class DenseNetwork(nnx.Module):
    """A fully connected equilibrium, `z* = tanh(s(v) W z* + U i + b + t(v))`, for few numbers.

    The norm of W is kept so that the cell contracts by `contraction` at every context v.
    """

    def __init__(
        self, inputs: int, *, width: int, context: int, contraction: float, rngs: nnx.Rngs
    ):
        """Initial parameters.

        Args:
            inputs: numbers an example.
            width: of the state, which is also the features.
            context: of the context vector.
            contraction: bound on the cell's Lipschitz constant, in (0, 1).
            rngs: source of the parameters' keys.
        """
        self.width = width
        self.bound = contraction / (1 + _MODULATION)
        self.recurrent = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.injection = nnx.Linear(
            inputs, width, bias_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        self.modulation = Modulation(context, width, rngs=rngs)
        self.contract()

    def inject(self, inputs: Array) -> Array:
        """[M, inputs] to [M, width]."""
        return self.injection(inputs)

    def cell(self, z: Array, context: Array, injection: Array) -> Array:
        """The next state [B, n, width]."""
        scale, shift = self.modulation(context)
        return jnp.tanh(scale[:, None] * self.recurrent(z) + injection + shift[:, None])

    def features(self, z: Array) -> Array:
        """The state itself."""
        return z

    def initial_state(self, tasks: int, examples: int) -> Array:
        """Zeros [tasks, examples, width]."""
        return jnp.zeros((tasks, examples, self.width))

    def contract(self) -> None:
        """Scales W down to its bound."""
        kernel = self.recurrent.kernel
        kernel[...] = limit_spectral_norm(kernel[...], self.bound)
        self.modulation.contract()


class CompactNetwork(nnx.Module):
    """A small convolutional equilibrium, `z* = tanh(s(v) (K * z*) + i + t(v))`.

    The injection i is two strided convolutions of the image, each normalised; the features are two
    more of z*, flattened. Activations are smooth: behind a ReLU the fast parameters' gradient has
    kinks. The norm of the convolution with K is kept so that the cell contracts
    by `contraction` at every context v.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        channels: tuple[int, int],
        strides: tuple[int, int],
        context: int,
        contraction: float,
        rngs: nnx.Rngs,
    ):
        """Initial parameters.

        Args:
            image_shape: height, width and channels.
            channels: between the two convolutions of the injection, and of the state.
            strides: of these convolutions.
            context: of the context vector.
            contraction: bound on the cell's Lipschitz constant, in (0, 1).
            rngs: source of the parameters' keys.
        """
        height, width, inputs = image_shape
        for stride in strides:
            height, width = -(-height // stride), -(-width // stride)
        inner, outer = channels
        self.size = (height, width, outer)
        self.bound = contraction / (1 + _MODULATION)
        self.stem = nnx.List(
            [
                Conv(inputs, inner, 3, stride=strides[0], rngs=rngs),
                Conv(inner, outer, 3, stride=strides[1], rngs=rngs),
            ]
        )
        self.stem_norms = nnx.List([GroupNorm(inner, 8), GroupNorm(outer, 8)])
        self.recurrent = Conv(outer, outer, 3, rngs=rngs)
        self.modulation = Modulation(context, outer, rngs=rngs)
        self.readout = nnx.List([Conv(outer, outer, 3, stride=2, rngs=rngs) for _ in range(2)])
        self.readout_norms = nnx.List([GroupNorm(outer, 8) for _ in range(2)])
        self.contract()

    def inject(self, inputs: Array) -> Array:
        """Images [M, H, W, C] to [M, h, w, channels]."""
        first, second = self.stem
        inner = jax.nn.silu(self.stem_norms[0](first(inputs)))
        return self.stem_norms[1](second(inner))

    def cell(self, z: Array, context: Array, injection: Array) -> Array:
        """The next state [B, n, h, w, channels]."""
        scale, shift = (part[:, None, None, None] for part in self.modulation(context))
        fed_back = self.recurrent(z.reshape(-1, *self.size)).reshape(z.shape)
        return jnp.tanh(scale * fed_back + injection + shift)

    def features(self, z: Array) -> Array:
        """Features [B, n, D]."""
        y = _merge(z)
        for conv, norm in zip(self.readout, self.readout_norms, strict=True):
            y = jax.nn.silu(norm(conv(y)))
        return y.reshape(*z.shape[:2], -1)

    def initial_state(self, tasks: int, examples: int) -> Array:
        """Zeros [tasks, examples, h, w, channels]."""
        return jnp.zeros((tasks, examples, *self.size))

    def contract(self) -> None:
        """Scales K down to its bound."""
        kernel = self.recurrent.kernel[...]
        norm = convolution_norm(kernel, self.size[:2])
        self.recurrent.kernel[...] = kernel * jnp.minimum(1, self.bound / norm)
        self.modulation.contract()


def convolution_norm(kernel: Array, size: tuple[int, int]) -> Array:
    """The spectral norm of a convolution of images of this size, by power iteration.

    Args:
        kernel: [k, k, C, O].
        size: height and width of the images, padded with zeros.

    Returns:
        A scalar; the estimate comes from below.
    """

    def step(_: Array, image: Array) -> Array:
        y, pull_back = jax.vjp(lambda image: conv2d(image, kernel), image)
        back = pull_back(y)[0]
        return back / jnp.linalg.norm(back)

    first = jax.random.normal(jax.random.key(0), (1, *size, kernel.shape[2]), kernel.dtype)
    image = jax.lax.fori_loop(0, _POWER_ITERATIONS, step, first / jnp.linalg.norm(first))
    return jnp.linalg.norm(conv2d(image, kernel))


class MultiscaleNetwork(nnx.Module):
    """The paper's network for Omniglot: a multiscale cell, modulated after each first GroupNorm.

    Images of 28x28, widths (64, 128) and a context of 400 give the published sizes. Features are
    all branches, normalised, averaged over windows of 7x7 pixels and concatenated.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        widths: tuple[int, ...],
        context: int,
        rngs: nnx.Rngs,
    ):
        """Initial parameters.

        Args:
            image_shape: height, width and channels; sizes of branches must be multiples of 7.
            widths: channels of the branches, finest first, multiples of 8.
            context: of the context vector, a multiple of the number of branches.
            rngs: source of the parameters' keys.
        """
        height, width, channels = image_shape
        self.size = (height, width)
        self.injection = Conv(channels, widths[0], 3, rngs=rngs)
        self.injection_norm = GroupNorm(widths[0], 4)
        self.multiscale = MultiscaleCell(widths, context=context, state_scale=0.5, rngs=rngs)
        for block in self.multiscale.blocks:
            # A context of zero leaves the scale at one, where the published modulation starts at
            # random, and at its bias.
            assert block.film is not None
            assert block.film.bias is not None
            hidden = block.film.out_features // 2
            block.film.bias[...] = jnp.concatenate([jnp.ones(hidden), jnp.zeros(hidden)])
        self.output_norms = nnx.List([GroupNorm(width, 8) for width in widths])

    def inject(self, inputs: Array) -> Array:
        """Images [M, H, W, C] to what the finest branch receives, [M, H, W, widths[0]]."""
        return jax.nn.relu(self.injection_norm(self.injection(inputs)))

    def cell(self, z: tuple[Array, ...], context: Array, injection: Array) -> tuple[Array, ...]:
        """The next state, [B, n, H_i, W_i, C_i] a branch."""
        tasks, examples = injection.shape[:2]
        flat = tuple(_merge(branch) for branch in z)
        absent = [None] * (len(z) - 1)
        new = self.multiscale(
            flat, [_merge(injection), *absent], context=jnp.repeat(context, examples, axis=0)
        )
        return tuple(branch.reshape(tasks, examples, *branch.shape[1:]) for branch in new)

    def features(self, z: tuple[Array, ...]) -> Array:
        """Features [B, n, D]."""
        tasks, examples = z[0].shape[:2]
        parts = [
            nnx.avg_pool(norm(_merge(branch)), (7, 7), (7, 7)).reshape(tasks, examples, -1)
            for norm, branch in zip(self.output_norms, z, strict=True)
        ]
        return jnp.concatenate(parts, axis=-1)

    def initial_state(self, tasks: int, examples: int) -> tuple[Array, ...]:
        """Zeros, [tasks, examples, H_i, W_i, C_i] a branch."""
        shapes = self.multiscale.shapes(examples, self.size)
        return tuple(jnp.zeros((tasks, *shape)) for shape in shapes)

    def contract(self) -> None:
        """Nothing: the Jacobian penalty keeps this cell near a contraction."""


def _merge(leaf: Array) -> Array:
    """Tasks and examples on one axis."""
    return leaf.reshape(-1, *leaf.shape[2:])
