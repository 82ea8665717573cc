"""A small classifier whose cell is a contraction by construction, for a CPU.

The published cell keeps its state bounded by normalisations, which cost as much as its convolutions
on a CPU, and it contracts only as far as a penalty on its Jacobian makes it. Here the only loop is
one convolution under a bound on its norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdeq.nn import Conv
from jdeq.nn.conv import Precision, conv2d

_POWER_ITERATIONS = 10


@dataclass(frozen=True)
class ContractiveConfig:
    """Sizes of a `ContractiveClassifier`.

    Attributes:
        image_shape: height, width and channels of an image.
        stem: channels of the injection's first convolution.
        width: channels of the state.
        features: width of the head's hidden layer.
        strides: of the injection's two convolutions.
        classes: number of classes.
        contraction: bound on the norm of the recurrent convolution, in (0, 1).
    """

    image_shape: tuple[int, int, int]
    stem: int = 24
    width: int = 48
    features: int = 128
    strides: tuple[int, int] = (2, 2)
    classes: int = 10
    contraction: float = 0.9

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the state."""
        height, width, _ = self.image_shape
        for stride in self.strides:
            height, width = -(-height // stride), -(-width // stride)
        return height, width, self.width


class ContractiveClassifier(nnx.Module):
    """`z* = tanh(W z* + V silu(U image + a) + b)`, `logits = head(z*)`.

    U, V and W are 3x3 convolutions, U and V strided; the norm of W is bounded, so that each image
    has one equilibrium. The head is a hidden layer on all of the state. Activations are smooth:
    behind ReLUs the loss has kinks on which attacks of every kind get stuck.

    Args:
        config: sizes.
        precision: of the convolutions' products, see `jdeq.nn.conv2d`.
        rngs: source of the parameters' keys.
    """

    def __init__(self, config: ContractiveConfig, *, precision: Precision = None, rngs: nnx.Rngs):
        self.config = config
        shared: dict[str, Any] = {"precision": precision, "rngs": rngs}
        channels, strides = config.image_shape[2], config.strides
        height, width, depth = config.state_shape
        self.stem = Conv(channels, config.stem, 3, stride=strides[0], use_bias=True, **shared)
        self.injection = Conv(config.stem, depth, 3, stride=strides[1], use_bias=True, **shared)
        self.recurrent = Conv(depth, depth, 3, **shared)
        self.features = nnx.Linear(height * width * depth, config.features, **shared)
        self.classifier = nnx.Linear(config.features, config.classes, **shared)
        self.contract()

    def contract(self) -> None:
        """Scales W down to the bound on its norm."""
        kernel = self.recurrent.kernel
        norm = conv_norm(kernel[...], self.config.state_shape[:2])
        kernel[...] = kernel[...] * jnp.minimum(1, self.config.contraction / norm)

    def cell(self, z: Array, x: Array) -> Array:
        """Next state `[B, *state_shape]` for images `[B, H, W, channels]` in [0, 1]."""
        injected = self.injection(jax.nn.silu(self.stem(x)))
        return jnp.tanh(self.recurrent(z) + injected)

    def head(self, z: Array) -> Array:
        """Logits `[B, classes]` of a state."""
        hidden = jax.nn.silu(self.features(z.reshape(len(z), -1)))
        return self.classifier(hidden)

    def initial_state(self, batch: int) -> Array:
        """The state of zeros from which solves start, in float32."""
        return jnp.zeros((batch, *self.config.state_shape))


def conv_norm(kernel: Array, size: tuple[int, int], iterations: int = _POWER_ITERATIONS) -> Array:
    """The largest singular value of a convolution of images of one size.

    Args:
        kernel: `[k, k, C, C]`, applied at stride 1 with zeros around the image.
        size: height and width of the images.
        iterations: of the power method on `K^T K`, at least 1.

    Returns:
        A scalar, which comes from below.
    """

    def apply(image: Array) -> Array:
        return conv2d(image, kernel)

    def step(_: Array, image: Array) -> Array:
        moved, pull_back = jax.vjp(apply, image)
        (back,) = pull_back(moved)
        return back / jnp.linalg.norm(back)

    first = jax.random.normal(jax.random.key(0), (1, *size, kernel.shape[2]), kernel.dtype)
    image = jax.lax.fori_loop(0, iterations, step, first / jnp.linalg.norm(first))
    return jnp.linalg.norm(apply(image))
