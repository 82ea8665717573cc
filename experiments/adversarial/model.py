"""The multiscale classifier of the paper's adversarial experiments.

The optimised input is the perturbation of an image, so that the injection of the image is part of
the cell: `cell(z, image)`.

The published head normalises by batch statistics (BatchNorm), which couples the images of a batch
inside the solve. Here the head uses GroupNorm at the same places, with a scale and a shift exactly
where the published one has them, so that the parameter counts agree.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdeq.nn import Conv, GroupNorm, MultiscaleCell
from jdeq.nn.conv import Precision
from jdeq.nn.multiscale import State


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of a `Classifier`.

    Attributes:
        image_shape: height, width and channels of an image.
        widths: channels of the cell's branches, finest first.
        head_widths: inner channels h of the head's bottleneck in each branch; 4 h go on.
        features: channels before the linear classifier.
        classes: number of classes.
        groups: groups of the normalisations, but for the fusion's.
        fusion_groups: groups of the fusion's normalisations.
    """

    image_shape: tuple[int, int, int]
    widths: tuple[int, ...] = (24, 24)
    head_widths: tuple[int, ...] = (8, 16)
    features: int = 200
    classes: int = 10
    groups: int = 4
    fusion_groups: int = 8


PRESETS = {
    "mnist-published": ClassifierConfig(image_shape=(28, 28, 1)),
    "cifar-published": ClassifierConfig(image_shape=(32, 32, 3)),
}


class Injection(nnx.Module):
    """Image to the finest branch: 3x3 convolution, normalisation, ReLU, twice."""

    def __init__(
        self, channels: int, width: int, *, groups: int, precision: Precision, rngs: nnx.Rngs
    ):
        self.convs = nnx.List(
            [
                Conv(channels, width, 3, precision=precision, rngs=rngs),
                Conv(width, width, 3, precision=precision, rngs=rngs),
            ]
        )
        self.norms = nnx.List([GroupNorm(width, groups), GroupNorm(width, groups)])

    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, channels]` to `[B, H, W, width]`."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return x


class Bottleneck(nnx.Module):
    """Residual block of the head: 1x1 to h, 3x3, 1x1 to 4 h, beside a 1x1 skip to 4 h."""

    def __init__(self, width: int, h: int, *, groups: int, precision: Precision, rngs: nnx.Rngs):
        shared: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.convs = nnx.List(
            [
                Conv(width, h, 1, **shared),
                Conv(h, h, 3, **shared),
                Conv(h, 4 * h, 1, **shared),
            ]
        )
        # As published, only the skip's normalisation has a scale and a shift.
        self.norms = nnx.List([GroupNorm(c, groups, affine=False) for c in (h, h, 4 * h)])
        self.skip = Conv(width, 4 * h, 1, **shared)
        self.skip_norm = GroupNorm(4 * h, groups)

    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, width]` to `[B, H, W, 4 h]`."""
        y = jax.nn.relu(self.norms[0](self.convs[0](x)))
        y = jax.nn.relu(self.norms[1](self.convs[1](y)))
        y = self.norms[2](self.convs[2](y))
        return jax.nn.relu(y + self.skip_norm(self.skip(x)))


class Head(nnx.Module):
    """State to class scores: bottlenecks, finer ones strided into coarser ones, global mean."""

    def __init__(self, config: ClassifierConfig, *, precision: Precision, rngs: nnx.Rngs):
        shared: dict[str, Any] = {"precision": precision, "rngs": rngs}
        groups, widths = config.groups, [4 * h for h in config.head_widths]
        self.bottlenecks = nnx.List(
            [
                Bottleneck(width, h, groups=groups, **shared)
                for width, h in zip(config.widths, config.head_widths, strict=True)
            ]
        )
        self.strided = nnx.List(
            [
                Conv(fine, coarse, 3, stride=2, use_bias=True, **shared)
                for fine, coarse in pairwise(widths)
            ]
        )
        self.strided_norms = nnx.List([GroupNorm(width, groups) for width in widths[1:]])
        self.features = Conv(widths[-1], config.features, 1, use_bias=True, **shared)
        self.features_norm = GroupNorm(config.features, groups)
        self.classifier = nnx.Linear(
            config.features, config.classes, precision=precision, rngs=rngs
        )

    def __call__(self, z: State) -> Array:
        """Maps a state to logits `[B, classes]`."""
        y = self.bottlenecks[0](z[0])
        for i, (conv, norm) in enumerate(zip(self.strided, self.strided_norms, strict=True)):
            y = self.bottlenecks[i + 1](z[i + 1]) + jax.nn.relu(norm(conv(y)))
        y = jax.nn.relu(self.features_norm(self.features(y)))
        return self.classifier(jnp.mean(y, axis=(1, 2)))


class Classifier(nnx.Module):
    """A multiscale equilibrium classifier, `z* = cell(z*, image)`, `logits = head(z*)`.

    Args:
        config: sizes; `PRESETS` has the published ones (158,554 parameters for MNIST and 158,986
            for CIFAR-10, 111,792 of them in the cell).
        precision: of the convolutions' products, see `jdeq.nn.conv2d`.
        rngs: source of the parameters' keys.
    """

    def __init__(self, config: ClassifierConfig, *, precision: Precision = None, rngs: nnx.Rngs):
        self.config = config
        shared: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.injection = Injection(
            config.image_shape[2], config.widths[0], groups=config.groups, **shared
        )
        self.multiscale = MultiscaleCell(
            config.widths,
            groups=config.groups,
            fusion_groups=config.fusion_groups,
            # Solves of the untrained cell converge at 0.5 (published: 1, and they stall).
            state_scale=0.5,
            **shared,
        )
        self.output = Head(config, **shared)

    def inject(self, x: Array) -> Array:
        """What images `[B, H, W, channels]` add to the finest branch: `[B, H, W, widths[0]]`."""
        return self.injection(x)

    def contract(self) -> None:
        """Nothing: the Jacobian penalty keeps this cell near a contraction."""

    def cell(self, z: State, x: Array, masks: State | None = None) -> State:
        """Next state for images `[B, H, W, channels]` in [0, 1], perturbation included.

        Args:
            z: state, one `[B, H_i, W_i, C_i]` a branch.
            x: images.
            masks: dropout masks `[B, C_i]`, see `jdeq.nn.variational_masks`.
        """
        absent = [None] * (len(self.config.widths) - 1)
        return self.multiscale(z, [self.inject(x), *absent], masks)

    def head(self, z: State) -> Array:
        """Logits `[B, classes]` of a state."""
        return self.output(z)

    def initial_state(self, batch: int) -> State:
        """The state of zeros from which solves start, in float32."""
        return tuple(
            jnp.zeros(s) for s in self.multiscale.shapes(batch, self.config.image_shape[:2])
        )
