"""The multiscale generator: parameter count, shapes, range of images, where training starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdeq
from experiments.generative.config import PRESETS
from experiments.generative.model import MultiscaleGenerator
from experiments.generative.problem import build_generator

ROOT = Path(__file__).parents[3]


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_published_size():
    model = nnx.eval_shape(
        lambda: MultiscaleGenerator(
            (64, 64, 3), latent_dim=128, channels=(32, 64, 128, 256), rngs=nnx.Rngs(0)
        )
    )
    assert count(model) == 40_799_552
    assert count(model.multiscale) == 8_716_192
    assert sum(z.size for z in nnx.eval_shape(lambda: model.initial_state(1))) == 245_760


def test_the_published_preset_has_the_published_size():
    config = PRESETS["celeba-published"]
    params = jax.eval_shape(lambda: build_generator(config, (64, 64, 3), seed=0)[1])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 40_799_552
    start = jax.eval_shape(lambda: build_generator(config, (64, 64, 3), 0)[0].start(params, 1))
    x0, z0 = start
    assert x0.shape == (1, 128)
    shapes = [(1, 64, 64, 32), (1, 32, 32, 64), (1, 16, 16, 128), (1, 8, 8, 256)]
    assert [z.shape for z in z0] == shapes
    assert (config.batch_size, config.inner_steps, config.jacobian_probes) == (48, 100, 2)


@pytest.mark.slow
def test_a_training_step_of_the_published_size():
    """All 100 iterations at batch 4, in a process of its own whose memory is measured."""
    code = """
import dataclasses, resource
import jax, jax.numpy as jnp, optax
from experiments.generative.config import PRESETS
from experiments.generative.problem import build_generator, outer_optimizer
from experiments.generative.train import training_loss

config = dataclasses.replace(PRESETS["celeba-published"], batch_size=4)
generator, params = build_generator(config, (64, 64, 3), seed=0)
images = jax.random.uniform(jax.random.key(0), (4, 64, 64, 3))
optimizer = outer_optimizer(config, config.steps)
x0, _ = generator.start(params, 4)

@jax.jit
def step(params, memory):
    keys = jax.random.split(jax.random.key(1), 4)
    gradient, (metrics, *_) = jax.grad(training_loss, has_aux=True)(
        params, generator, config, images, keys, x0
    )
    updates, memory = optimizer.update(gradient, memory, params)
    return optax.apply_updates(params, updates), memory, metrics

params, memory, metrics = step(params, optimizer.init(params))
assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
assert all(bool(jnp.isfinite(value)) for value in metrics.values()), metrics
gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
assert gibibytes < 24, gibibytes
print("peak GiB", gibibytes, {name: float(value) for name, value in metrics.items()})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)


def multiscale(image_shape, channels):
    return MultiscaleGenerator(image_shape, latent_dim=4, channels=channels, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("image_shape", "channels"),
    [((8, 8, 1), (8, 16)), ((12, 10, 3), (8, 8, 16)), ((7, 6, 1), (8, 8))],
)
def test_multiscale_images_of_any_size(image_shape, channels):
    model = multiscale(image_shape, channels)
    images = jax.jit(lambda: model.decode(model.cell(model.initial_state(2), jnp.ones((2, 4)))))()
    assert images.shape == (2, *image_shape)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1


def test_the_multiscale_generator_starts_as_a_contraction_that_its_latents_move():
    model = multiscale((8, 8, 1), (8, 16))
    graph, params = nnx.split(model)

    def cell(params, z, x):
        return nnx.merge(graph, params).cell(z, x)

    def images(x):
        solution = jdeq.deq(cell, params, x, model.initial_state(len(x)), rtol=1e-4)
        return model.decode(solution.value), solution.result

    def loss(x):
        made, result = images(x)
        return jnp.sum(made**2), result

    gradient, result = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros((2, 4)))
    assert (np.asarray(result) == int(jdeq.Result.converged)).all()
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient).min()) > 0


def test_mixing_before_upsampling_is_mixing_after():
    model = multiscale((8, 8, 1), (8, 16))
    output = model.output
    z = tuple(
        jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(model.initial_state(2))
    )
    upsampled = [z[0], jax.image.resize(z[1], (2, 8, 8, 16), "bilinear")]
    want = output.mix(jnp.concatenate(upsampled, axis=-1))
    np.testing.assert_allclose(jax.jit(output._mixed)(z), want, atol=1e-5)
