"""Training by nested solves follows the gradient of the optimal objective."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import jdeq
from experiments.common.data import ArrayImages, Split
from experiments.generative.config import PRESETS
from experiments.generative.nested_training import nested_error, nested_loss
from experiments.generative.problem import build_generator

CONFIG = replace(
    PRESETS["smoke"], hidden=12, decoder_hidden=12, latent_dim=2, latent_penalty=0.1,
    nested_inner_steps=150, inner_step_size=0.1, evaluation_nested_steps=20, evaluation_batch=4,
)  # fmt: skip
IMAGES = np.random.default_rng(0).random((6, 4, 4, 1), np.float32)


def test_the_gradient_is_the_envelope_gradient():
    generator, params = build_generator(CONFIG, (4, 4, 1), seed=0)
    images = jnp.asarray(IMAGES)
    x0, z0 = generator.start(params, len(images))

    def optimum(params):
        values, _ = jdeq.input_value(
            generator.problem, params, images, x0, z0, rtol=1e-5, max_steps=500
        )
        return jnp.mean(values)

    keys = jax.random.split(jax.random.key(0), len(images))
    found = jax.grad(nested_loss, has_aux=True)(params, generator, CONFIG, images, keys)[0]
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.grad(optimum)(params)), strict=True
    ):
        # The nested solve stops at relative residuals of 1e-3, of which this is a few.
        np.testing.assert_allclose(one, other, atol=2e-2 * float(jnp.abs(other).max()) + 1e-6)


def test_errors_are_those_of_the_images_however_they_are_batched():
    generator, params = build_generator(CONFIG, (4, 4, 1), seed=0)
    errors = nested_error(generator, params, Split(ArrayImages(IMAGES)), CONFIG)
    single = nested_error(generator, params, Split(ArrayImages(IMAGES[2:])), CONFIG)
    assert errors.shape == (6,)
    np.testing.assert_allclose(errors[2:], single, rtol=1e-3)
