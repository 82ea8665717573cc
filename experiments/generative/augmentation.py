"""Random transformations of training images: what few images lack, every step draws anew.

A transformed image is `rows image columns^T`, flipped, shifted and zoomed, with its values spread
about their mean and shifted:

    y = mean + exp(c) (rows image columns^T - mean) + b,   clipped to [0, 1]

Every number is uniform within the bounds of the settings, by a PRNG key of the image's own.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common.data import ArrayImages, Split
from experiments.common.step import split_each
from experiments.generative.config import Config

_REACH = 2  # pixels to either side that Keys' cubic kernel takes
_COPIES_UP_TO = 5000  # images, where there are fewer


def augments(config: Config) -> bool:
    """Whether training images are transformed at all."""
    bounds = (
        config.augment_shift,
        config.augment_zoom,
        config.augment_contrast,
        config.augment_brightness,
    )
    return config.augment_flip or any(bounds)


def augmented(config: Config, images: Array, keys: Array) -> tuple[Array, Array]:
    """Images as a training step takes them, and keys for whatever else it draws.

    Args:
        config: Settings; without augmentation images and keys are returned as they are.
        images: [B, H, W, C] in [0, 1].
        keys: PRNG keys, [B].

    Returns:
        (images [B, H, W, C] in [0, 1], keys [B]).
    """
    if not augments(config):
        return images, keys
    own, further = split_each(keys)
    return jax.vmap(partial(_transformed, config))(images, own), further


def augmented_split(config: Config, split: Split, seed: int) -> Split:
    """The images with transformed copies of them all, for what is fitted to all images at once.

    Args:
        config: Settings.
        split: Images.
        seed: Of the transformations.

    Returns:
        The images and one copy of each, or as many as 5,000 images have room for.
    """
    images = split.first(len(split))
    copies = max(1, _COPIES_UP_TO // len(split) - 1)
    transform = jax.jit(partial(augmented, config))
    keys = jax.random.split(jax.random.key(seed), (copies, len(split)))
    made = [np.asarray(transform(images, keys[number])[0]) for number in range(copies)]
    return Split(ArrayImages(np.concatenate([images, *made])))


def _transformed(config: Config, image: Array, key: Array) -> Array:
    flip, zooms, shifts, contrast, brightness = jax.random.split(key, 5)
    vertical, horizontal = jnp.exp(_within(zooms, config.augment_zoom, 2))
    if config.augment_flip:
        horizontal = jnp.where(jax.random.bernoulli(flip), horizontal, -horizontal)
    down, right = _within(shifts, config.augment_shift, 2)
    height, width, _ = image.shape
    rows, columns = _resampling(height, vertical, down), _resampling(width, horizontal, right)
    y = jnp.einsum("ij,jkc,lk->ilc", rows, image, columns)
    mean = jnp.mean(y)
    y = mean + jnp.exp(_within(contrast, config.augment_contrast)) * (y - mean)
    return jnp.clip(y + _within(brightness, config.augment_brightness), 0.0, 1.0)


def _within(key: Array, bound: float, *shape: int) -> Array:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _resampling(side: int, zoom: Array, shift: Array) -> Array:
    """The matrix [side, side] that zooms about the middle, mirrors if negative, and shifts.

    Cubic interpolation (Keys, 1981, a = -1/2), which blurs less than a linear one; the outermost
    pixels are continued.
    """
    middle = (side - 1) / 2
    at = middle + (jnp.arange(side) - middle) * zoom + shift * side
    at = jnp.clip(at, 0, side - 1)
    weights = _cubic(at[:, None] - jnp.arange(-_REACH, side + _REACH))
    inside = weights[:, _REACH:-_REACH]
    inside = inside.at[:, 0].add(weights[:, :_REACH].sum(axis=1))
    return inside.at[:, -1].add(weights[:, -_REACH:].sum(axis=1))


def _cubic(distance: Array) -> Array:
    d = jnp.abs(distance)
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return jnp.where(d < 1, near, jnp.where(d < 2, far, 0.0))
