"""The published classifier: parameter counts, shapes, independence of problems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.adversarial.model import PRESETS, Classifier, ClassifierConfig


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(
    ("preset", "total", "state"),
    [("mnist-published", 158_554, 23_520), ("cifar-published", 158_986, 30_720)],
)
def test_published_sizes(preset, total, state):
    model = nnx.eval_shape(lambda: Classifier(PRESETS[preset], rngs=nnx.Rngs(0)))
    assert count(model) == total
    assert count(model.multiscale) == 111_792
    assert sum(z.size for z in model.initial_state(1)) == state


@pytest.fixture(scope="module")
def small():
    config = ClassifierConfig(image_shape=(8, 8, 1), widths=(8, 8), head_widths=(4, 8), features=16)
    return Classifier(config, rngs=nnx.Rngs(0))


def test_shapes(small):
    x = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    z = jax.eval_shape(small.cell, small.initial_state(3), x)
    assert [a.shape for a in z] == [(3, 8, 8, 8), (3, 4, 4, 8)]
    assert jax.eval_shape(small.inject, x).shape == (3, 8, 8, 8)
    assert jax.eval_shape(small.head, z).shape == (3, 10)


def test_images_do_not_see_each_other(small):
    x = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))

    @jax.jit
    def logits(x):
        z = small.initial_state(len(x))
        for _ in range(3):
            z = small.cell(z, x)
        return small.head(z)

    # Float32 sums in another order for another batch, through three cells of normalisations.
    np.testing.assert_allclose(logits(x)[:1], logits(x[:1]), atol=1e-4)


def test_an_image_moves_its_logits(small):
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
    gradient = jax.jit(
        jax.grad(lambda x: small.head(small.cell(small.initial_state(2), x))[:, 0].sum())
    )(x)
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient).max()) > 0
