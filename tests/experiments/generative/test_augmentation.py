"""Random transformations of training images against what they are defined as."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.data import ArrayImages, Split
from experiments.generative import nested_training, train, vae
from experiments.generative.augmentation import augmented, augmented_split, augments
from experiments.generative.config import PRESETS

PLAIN = replace(PRESETS["smoke"], hidden=16, latent_dim=4, inner_steps=5, nested_inner_steps=2)
SHAPE = (12, 10, 1)
COUNT = 64


@pytest.fixture(scope="module")
def images():
    smooth = np.random.default_rng(0).random((COUNT, 4, 5, 1), np.float32)
    return np.asarray(jax.image.resize(0.2 + 0.6 * smooth, (COUNT, *SHAPE), "linear"))


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(3), COUNT)


def test_without_augmentation_images_and_keys_stay_as_they_are(images, keys):
    made, further = augmented(PLAIN, images, keys)
    assert made is images
    assert further is keys
    assert not augments(PLAIN)


def test_half_of_the_images_are_mirrored_and_nothing_else(images, keys):
    made, _ = augmented(replace(PLAIN, augment_flip=True), images, keys)
    same = np.abs(made - images).max(axis=(1, 2, 3)) < 1e-5
    mirrored = np.abs(made - images[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    assert (same ^ mirrored).all()
    assert 16 < same.sum() < 48


def test_shifts_stay_within_their_bound_and_take_other_keys_to_other_places(keys):
    rows = np.linspace(0.1, 0.9, SHAPE[0], dtype=np.float32)
    ramps = np.broadcast_to(rows[None, :, None, None], (COUNT, *SHAPE))
    made, _ = augmented(replace(PLAIN, augment_shift=0.1), ramps, keys)
    inner = slice(4, -4)  # cubic interpolation reproduces a ramp where no edge is near
    moved = np.asarray(made - ramps)[:, inner] / (rows[1] - rows[0]) / SHAPE[0]
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1, :1], moved.shape), atol=1e-4)
    assert np.abs(moved).max() <= 0.1 + 1e-4
    assert moved.min() < -0.08
    assert moved.max() > 0.08


def test_zooms_stretch_about_the_middle(keys):
    columns = np.linspace(-0.4, 0.4, SHAPE[1], dtype=np.float32)
    ramps = np.broadcast_to(0.5 + columns[None, None, :, None], (COUNT, *SHAPE))
    made, _ = augmented(replace(PLAIN, augment_zoom=0.2), ramps, keys)
    middle = np.asarray(made)[:, 0, 3:-3, 0] - 0.5
    factors = middle / columns[3:-3]
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1], factors.shape), rtol=1e-3)
    assert np.abs(np.log(factors)).max() <= 0.2 + 1e-3
    assert np.log(factors).std() == pytest.approx(0.2 / np.sqrt(3), rel=0.2)


def test_contrast_and_brightness_are_of_the_whole_image(images, keys):
    config = replace(PLAIN, augment_contrast=0.2, augment_brightness=0.05)
    made, _ = augmented(config, images, keys)
    whole = np.asarray(made).min(axis=(1, 2, 3)) > 0
    whole &= np.asarray(made).max(axis=(1, 2, 3)) < 1
    assert whole.sum() > 32
    before, after = images[whole].reshape(whole.sum(), -1), np.asarray(made)[whole]
    after = after.reshape(len(before), -1)
    shifts = after.mean(axis=1) - before.mean(axis=1)
    factors = after.std(axis=1) / before.std(axis=1)
    assert 0.04 < np.abs(shifts).max() <= 0.05 + 1e-5
    assert 0.15 < np.abs(np.log(factors)).max() <= 0.2 + 1e-4
    centred = before - before.mean(axis=1, keepdims=True)
    expected = factors[:, None] * centred + after.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(after, expected, atol=1e-4)


def test_images_stay_in_range_and_each_goes_by_its_own_key(images, keys):
    config = replace(
        PLAIN, augment_flip=True, augment_shift=0.2, augment_zoom=0.3, augment_contrast=1.0,
        augment_brightness=0.5,
    )  # fmt: skip
    made, further = augmented(config, images, keys)
    assert made.shape == images.shape
    assert 0 <= made.min() <= made.max() <= 1
    alone, _ = augmented(config, images[5:6], keys[5:6])
    np.testing.assert_allclose(alone[0], made[5], atol=1e-6)
    assert not (jax.random.key_data(further) == jax.random.key_data(keys)).all()


def test_a_split_gets_as_many_copies_as_there_is_room_for(images):
    config = replace(PLAIN, augment_flip=True)
    few = augmented_split(config, Split(ArrayImages(images)), seed=0)
    assert len(few) == 5000 // COUNT * COUNT
    made = few.first(len(few))
    np.testing.assert_allclose(made[:COUNT], images)
    mirrored = images[:, :, ::-1]
    copies = made[COUNT:].reshape(-1, COUNT, *SHAPE)
    nearest = np.minimum(np.abs(copies - images), np.abs(copies - mirrored))
    assert nearest.max() < 0.7
    flipped = np.abs(copies - mirrored).max(axis=(2, 3, 4)) < 1e-5
    assert flipped.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("module", "loss"),
    [(train, "training_loss"), (nested_training, "nested_loss"), (vae, "vae_loss")],
)
def test_every_training_takes_transformed_images(monkeypatch, images, module, loss):
    class ArrivedError(Exception):
        pass

    def stop(params, network, config, given, *others):
        raise ArrivedError(given)

    monkeypatch.setattr(module, "augmented", lambda config, images, keys: ("transformed", keys))
    monkeypatch.setattr(module, loss, stop)
    build = vae.build_vae if module is vae else train.build_generator
    network, params = build(PLAIN, SHAPE, seed=0)
    state = module.initial_state(PLAIN, params, 0)
    with pytest.raises(ArrivedError, match="transformed"):
        module.step_of(PLAIN, network)(state, {"image": images, "index": jnp.arange(COUNT)})
