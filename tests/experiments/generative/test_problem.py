"""The input problem of the generator, its inference, and the training loss."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from experiments.generative.config import PRESETS
from experiments.generative.inference import infer
from experiments.generative.problem import build_generator
from experiments.generative.train import initial_state, starting_latents, training_loss
from jdeq.joint import starts

CONFIG = replace(PRESETS["smoke"], hidden=24, latent_dim=4, jacobian_weight=0.0)
SHAPE = (8, 8, 1)


def keys_for(images):
    return jax.random.split(jax.random.key(0), len(images))


@pytest.fixture(scope="module")
def built():
    return build_generator(CONFIG, SHAPE, seed=0)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((10, *SHAPE), np.float32)


def test_the_objective_is_squared_error_plus_penalty(built, images):
    generator, params = built
    x = jax.random.normal(jax.random.key(0), (10, 4))
    _, z = generator.start(params, 10)
    found = generator.problem.objective(params, z, x, images)
    made = np.asarray(generator.decode(params, z))
    assert made.shape == images.shape
    assert made.min() >= 0
    assert made.max() <= 1
    expected = ((made - images) ** 2).sum(axis=(1, 2, 3)) + 1e-3 * (np.asarray(x) ** 2).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_images_are_decoded_at_the_equilibrium(built):
    generator, params = built
    x = jax.random.normal(jax.random.key(0), (3, 4))
    _, z = generator.start(params, 3)
    for _ in range(300):
        z = generator.problem.cell(params, z, x)
    np.testing.assert_allclose(generator.images(params, x), generator.decode(params, z), atol=1e-4)


def test_a_last_batch_that_is_smaller_changes_nothing(built, images):
    generator, params = built
    together = infer(generator, params, [images], CONFIG)
    parts = infer(generator, params, [images[:7], images[7:]], CONFIG)
    assert parts.latents.shape == (10, 4)
    assert parts.residual.state.shape == (10,)
    np.testing.assert_allclose(parts.squared_error, together.squared_error, rtol=1e-2)
    error = np.asarray(jnp.sum((parts.images - images) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(parts.squared_error, error, rtol=1e-5)


def test_the_training_gradient_is_that_of_the_optimal_value(images):
    # The strong penalty leaves one minimum, which the solve reaches within float32's accuracy.
    config = replace(CONFIG, inner_steps=800, inner_step_size=0.03, latent_penalty=1.0)
    generator, params = build_generator(config, SHAPE, seed=0)

    def loss(params):
        x0, _ = generator.start(params, len(images))
        return training_loss(params, generator, config, images, keys_for(images), x0)[0]

    gradient = jax.grad(loss)(params)
    along = float(optax.tree.norm(gradient))
    direction = jax.tree.map(lambda leaf: leaf / along, gradient)
    step = 1e-2
    ahead, behind = (
        float(loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)))
        for s in (step, -step)
    )
    assert along == pytest.approx((ahead - behind) / (2 * step), rel=0.02)


def test_the_jacobian_penalty_is_added_with_its_weight(built, images):
    generator, params = built
    keys = keys_for(images)
    x0, _ = generator.start(params, len(images))
    without, (metrics, *_) = training_loss(params, generator, CONFIG, images, keys, x0)
    config = replace(CONFIG, jacobian_weight=3.0)
    with_penalty, _ = training_loss(params, generator, config, images, keys, x0)
    assert metrics["jacobian"] > 0
    assert float(with_penalty - without) == pytest.approx(3 * float(metrics["jacobian"]), rel=1e-3)
    assert metrics["failed"] == 0


def test_images_seen_before_start_from_their_last_latent(images):
    config = replace(CONFIG, warm_starts=6, inner_step_size=0.05)
    generator, params = build_generator(config, SHAPE, seed=0)
    state = initial_state(config, params, seed=0)

    def solve(index):
        batch = {"image": images[index], "index": jnp.array(index)}
        x0 = starting_latents(state.memory.latents, generator, params, batch)
        _, measured = training_loss(params, generator, config, batch["image"], keys_for(index), x0)
        return x0, measured.found

    x0, first = solve([3, 1, 9])  # the last shares a slot with the first
    np.testing.assert_array_equal(x0, 0)
    latents = starts.update(state.memory.latents, jnp.array([3, 1, 9]), first)
    state = state._replace(memory=state.memory._replace(latents=latents))
    x0, second = solve([1, 3, 9])
    np.testing.assert_array_equal(x0, first.value.x[jnp.array([1, 0, 2])].at[2].set(0))
    assert np.all(second.aux.objective[:2] < first.aux.objective[jnp.array([1, 0])])


def test_a_damaged_image_harms_no_other(built, images):
    generator, params = built
    bad = images.copy()
    bad[3] = np.nan
    x0, z0 = generator.start(params, 10)

    def solve(targets):
        return jdeq.joint_solve(generator.problem, params, targets, x0, z0, max_steps=20)

    spoilt, clean = solve(jnp.asarray(bad)), solve(jnp.asarray(images))
    assert spoilt.result[3] == jdeq.Result.non_finite
    others = np.arange(10) != 3
    np.testing.assert_array_equal(spoilt.value.x[others], clean.value.x[others])


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_trains_on_the_shape_of_its_images(name):
    config = PRESETS[name]
    shapes = {
        "digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3),
        "faces": (48, 40, 1), "celeba": (64, 64, 3),
    }  # fmt: skip
    shape = shapes[config.dataset]

    def gradient(images):
        generator, params = build_generator(config, shape, seed=0)
        x, z = generator.start(params, 2)
        loss, _ = jax.grad(training_loss, has_aux=True)(
            params, generator, config, images, keys_for(images), x
        )
        return x, generator.decode(params, z), params, loss

    images = jnp.zeros((2, *shape))
    x, made, params, gradients = jax.eval_shape(gradient, images)  # shapes alone: nothing runs
    assert x.shape == (2, config.latent_dim)
    assert made.shape == images.shape
    assert jax.tree.structure(params) == jax.tree.structure(gradients)
