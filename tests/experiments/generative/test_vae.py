"""The autoencoder's loss: squared error, divergence in closed form, warm-up."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.generative.config import PRESETS
from experiments.generative.vae import build_vae, vae_loss

CONFIG = replace(PRESETS["smoke"], hidden=16, decoder_hidden=16, latent_dim=3, kl_weight=0.5)
IMAGES = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)


def losses(step):
    vae, params = build_vae(CONFIG, (8, 8, 1), seed=0)
    keys = jax.random.split(jax.random.key(1), len(IMAGES))
    loss, measured = vae_loss(params, vae, CONFIG, jnp.asarray(IMAGES), keys, jnp.asarray(step))
    return float(loss), {name: float(value) for name, value in measured.means.items()}


def test_the_divergence_is_that_from_the_standard_normal_distribution():
    vae, params = build_vae(CONFIG, (8, 8, 1), seed=0)
    mean, log_variance = (np.asarray(part) for part in vae.encode(params, jnp.asarray(IMAGES)))
    variance = np.exp(log_variance)
    expected = 0.5 * np.sum(variance + mean**2 - 1 - np.log(variance), axis=1).mean()
    assert losses(0)[1]["divergence"] == pytest.approx(expected, rel=1e-5)


def test_the_divergence_is_warmed_up_and_then_has_its_weight():
    cold, metrics = losses(0)
    assert cold == pytest.approx(64 * metrics["mean_squared_error"], rel=1e-5)
    for step, warmth in ((3, 0.5), (6, 1.0), (60, 1.0)):  # a tenth of 60 steps
        warm, _ = losses(step)
        assert warm - cold == pytest.approx(warmth * 0.5 * metrics["divergence"], rel=1e-3)


def test_reconstructions_do_not_depend_on_how_the_images_are_batched():
    vae, params = build_vae(CONFIG, (8, 8, 1), seed=0)
    whole = vae.reconstruct(params, [IMAGES])
    assert whole.shape == IMAGES.shape
    np.testing.assert_allclose(vae.reconstruct(params, [IMAGES[:3], IMAGES[3:]]), whole, atol=1e-5)
    assert vae.latents(params, IMAGES).shape == (5, 3)


def test_an_encoder_with_convolutions_takes_images_of_odd_size():
    config = replace(CONFIG, channels=(4, 8))
    vae, params = build_vae(config, (7, 5, 3), seed=0)
    mean, log_variance = vae.encode(params, jnp.ones((2, 7, 5, 3)))
    assert mean.shape == log_variance.shape == (2, 3)
