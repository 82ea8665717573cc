"""What is seen of an image, and how it is corrupted: linear, separable and masked, plus noise.

    observed = mask * (rows image columns^T) + noise

Denoising, inpainting and super-resolution differ in these arrays alone, so that one compiled
program serves them all. Super-resolution sees the means of blocks, each written to every pixel of
its block: the same information as the small image, at the size of the large one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common.errors import UserError
from experiments.common.step import split_each

_BOX = 20 / 64  # side of the hidden box over that of the image (published: 20x20 at 64x64)


class Setting(NamedTuple):
    """One inverse problem for images of one size; settings stack along a first axis.

    Attributes:
        noise: Standard deviation of the Gaussian noise, [].
        boxed: Whether a random box is hidden, [].
        rows: Matrix applied to the columns' entries, [H, H].
        columns: Matrix applied to the rows' entries, [W, W].
    """

    noise: Array
    boxed: Array
    rows: Array
    columns: Array


class Measurement(NamedTuple):
    """How each image of a batch is seen.

    Attributes:
        mask: 1 where a pixel is seen, 0 where it is hidden, [B, H, W, 1].
        rows: [B, H, H].
        columns: [B, W, W].
    """

    mask: Array
    rows: Array
    columns: Array


class Kind(NamedTuple):
    """An inverse problem whatever the size of the images.

    Attributes:
        label: What figures call it.
        noise: Standard deviation of the noise.
        boxed: Whether a random box is hidden.
        factor: Side of the blocks whose means are seen.
    """

    label: str
    noise: float = 0.0
    boxed: bool = False
    factor: int = 1


KINDS = {
    "denoise02": Kind("denoising, noise 0.2", noise=0.2),
    "denoise04": Kind("denoising, noise 0.4", noise=0.4),
    "inpaint": Kind("inpainting", boxed=True),
    "super2": Kind("super-resolution by 2", factor=2),
    "super4": Kind("super-resolution by 4", factor=4),
}


def setting(kind: Kind, image_shape: tuple[int, int, int]) -> Setting:
    """The problem for images of this shape.

    Raises:
        UserError: The blocks of a super-resolution do not fit into the image.
    """
    height, width, _ = image_shape
    if height % kind.factor or width % kind.factor:
        raise UserError(
            f"{kind.label} needs sides divisible by {kind.factor}, but the images are "
            f"{height}x{width}; resize them to a multiple."
        )
    return Setting(
        jnp.float32(kind.noise),
        jnp.asarray(kind.boxed),
        _block_means(height, kind.factor),
        _block_means(width, kind.factor),
    )


def corrupt(at: Setting, images: Array, keys: Array) -> tuple[Array, Measurement]:
    """(what is observed of images [B, H, W, C] in [0, 1], how); PRNG keys [B].

    Noise is not clipped: observed values may lie outside [0, 1].
    """
    count, *shape = images.shape
    places, draws = split_each(keys)
    box = jax.vmap(lambda key: box_mask(key, (shape[0], shape[1])))(places)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(draws)
    measurement = Measurement(
        jnp.where(at.boxed, box, 1.0)[..., None],
        jnp.broadcast_to(at.rows, (count, *at.rows.shape)),
        jnp.broadcast_to(at.columns, (count, *at.columns.shape)),
    )
    added = at.noise * measurement.mask * noise
    return measure(measurement, images) + added, measurement


def measure(measurement: Measurement, images: Array) -> Array:
    """What is seen of images [B, H, W, C], without noise: [B, H, W, C]."""
    seen = jnp.einsum("bij,bjkc,blk->bilc", measurement.rows, images, measurement.columns)
    return measurement.mask * seen


def box_sides(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the hidden box in images of this (height, width): at least 1."""
    height, width = (max(1, round(_BOX * side)) for side in size)
    return height, width


def box_mask(key: Array, size: tuple[int, int]) -> Array:
    """Ones but for a box of zeros, wholly inside the image: [H, W]."""
    inside = []
    for side, length, draw in zip(size, box_sides(size), jax.random.split(key), strict=True):
        first = jax.random.randint(draw, (), 0, side - length + 1)
        at = jnp.arange(side)
        inside.append((at >= first) & (at < first + length))
    return 1.0 - (inside[0][:, None] & inside[1]).astype(jnp.float32)


def check_images(images: np.ndarray, noise: float = 0.0) -> None:
    """Refuse what are no images in [0, 1], up to six standard deviations of noise.

    Args:
        images: [N, H, W, C].
        noise: Standard deviation of the noise that they carry.

    Raises:
        UserError: Wrong number of axes, no images, not finite, or out of range.
    """
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(
            f"images of shape {images.shape} were given, but [count, height, width, channels] "
            "with at least one image is expected."
        )
    if not np.isfinite(images).all():
        raise UserError("some pixels are not finite; replace them, or hide them by a mask.")
    low, high = float(images.min()), float(images.max())
    if low < -6 * noise - 1e-6 or high > 1 + 6 * noise + 1e-6:
        raise UserError(
            f"pixels range from {low:.3g} to {high:.3g}, but images in [0, 1] are expected "
            f"(noise of standard deviation {noise:g} allowed for); divide 8-bit images by 255."
        )


def _block_means(side: int, factor: int) -> Array:
    """The matrix that replaces each entry by the mean of its block; the identity for factor 1."""
    block = np.arange(side) // factor
    return jnp.asarray((block[:, None] == block) / factor, jnp.float32)
