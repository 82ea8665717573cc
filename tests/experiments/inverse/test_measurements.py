"""Corruptions do what they are named after."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.inverse.measurements import (
    KINDS,
    Kind,
    box_mask,
    box_sides,
    check_images,
    corrupt,
    measure,
    setting,
)

IMAGES = np.random.default_rng(0).random((40, 12, 8, 3), np.float32)


def corrupted(kind, images=IMAGES, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(images))
    observed, how = corrupt(setting(kind, images.shape[1:]), jnp.asarray(images), keys)
    return np.asarray(observed), how


@pytest.mark.parametrize("noise", [0.2, 0.4])
def test_noise_has_its_standard_deviation_and_mean_zero(noise):
    added = corrupted(Kind("", noise=noise))[0] - IMAGES
    assert added.std() == pytest.approx(noise, rel=0.02)
    assert abs(added.mean()) < 0.01


def test_blocks_are_replaced_by_their_means():
    observed, how = corrupted(Kind("", factor=4))
    means = IMAGES.reshape(40, 3, 4, 2, 4, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(observed, means.repeat(4, axis=1).repeat(4, axis=2), atol=1e-6)
    np.testing.assert_allclose(measure(how, jnp.asarray(IMAGES)), observed, atol=1e-6)


def test_boxes_hide_nothing_else_and_are_elsewhere_in_each_image():
    observed, how = corrupted(KINDS["inpaint"])
    hidden = np.asarray(how.mask)[..., 0] == 0
    assert (hidden.sum(axis=(1, 2)) == 4 * 2).all()  # 20/64 of 12 and of 8, rounded
    np.testing.assert_allclose(observed, np.where(hidden[..., None], 0, IMAGES), atol=1e-6)
    assert len(np.unique(hidden, axis=0)) > 10


def test_the_published_box_and_the_smallest():
    assert box_sides((64, 64)) == (20, 20)
    assert box_sides((28, 28)) == (9, 9)
    assert box_sides((1, 1)) == (1, 1)


def test_boxes_lie_wholly_inside_and_reach_every_edge():
    keys = jax.random.split(jax.random.key(0), 300)
    hidden = np.asarray(jax.vmap(lambda key: box_mask(key, (6, 5)))(keys)) == 0
    assert (hidden.sum(axis=(1, 2)) == 4).all()
    ever = hidden.any(axis=0)
    assert ever.all()


def test_sides_that_blocks_do_not_divide_are_refused():
    with pytest.raises(UserError, match="divisible by 4, but the images are 30x28"):
        setting(KINDS["super4"], (30, 28, 1))


def test_what_are_no_images_is_refused():
    check_images(IMAGES)
    check_images(IMAGES + 0.5, noise=0.2)
    with pytest.raises(UserError, match="divide 8-bit images by 255"):
        check_images(255 * IMAGES)
    with pytest.raises(UserError, match=r"range from -0\.5"):
        check_images(IMAGES - 0.5)
    with pytest.raises(UserError, match="not finite"):
        check_images(np.where(IMAGES > 0.9, np.nan, IMAGES))
    with pytest.raises(UserError, match="at least one image"):
        check_images(IMAGES[:0])
    with pytest.raises(UserError, match="count, height"):
        check_images(IMAGES[0])
