"""The multiscale generator: parameter count, shapes, range of images, where training starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdeq
from experiments.generative.model import MultiscaleGenerator


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
