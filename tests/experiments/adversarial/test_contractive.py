"""The small classifier: it contracts, whatever training did to its weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.adversarial.contractive import ContractiveClassifier, conv_norm
from jdeq.nn import conv2d
from tests.experiments.adversarial.conftest import SIZES


def test_the_norm_of_a_convolution_is_that_of_its_matrix():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 2))
    units = jnp.eye(5 * 4 * 2).reshape(-1, 5, 4, 2)
    matrix = conv2d(units, kernel).reshape(len(units), -1)
    exact = np.linalg.norm(np.asarray(matrix), 2)
    assert float(conv_norm(kernel, (5, 4), iterations=100)) == pytest.approx(exact, rel=1e-3)
    assert float(conv_norm(kernel, (5, 4))) <= exact * (1 + 1e-5)


def test_it_contracts_after_any_change_of_its_weights():
    model = ContractiveClassifier(SIZES, rngs=nnx.Rngs(0))
    model.recurrent.kernel[...] = 50.0 * model.recurrent.kernel[...] + 1.0
    model.contract()
    x = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    a, b = (jax.random.normal(jax.random.key(k), model.initial_state(3).shape) for k in (1, 2))
    distance = jnp.linalg.norm(model.cell(a, x) - model.cell(b, x))
    assert float(distance) <= 0.95 * float(jnp.linalg.norm(a - b))
    kernel = model.recurrent.kernel[...]
    # A second time it only rescales by the rounding of its power iteration, in float32.
    model.contract()
    np.testing.assert_allclose(model.recurrent.kernel[...], kernel, rtol=1e-5)


def test_shapes_follow_the_strides():
    model = ContractiveClassifier(SIZES, rngs=nnx.Rngs(0))
    assert SIZES.state_shape == (2, 2, 6)
    z = model.initial_state(5)
    assert z.shape == (5, 2, 2, 6)
    assert model.cell(z, jnp.ones((5, 8, 8, 1))).shape == z.shape
    assert model.head(z).shape == (5, 10)


def test_the_loss_has_no_kinks(victim):
    ends = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)

    def largest_jump(points):
        share = jnp.linspace(0.0, 1.0, points)[:, None, None, None]
        images = (1 - share) * ends[0] + share * ends[1]
        gradient = jax.grad(lambda images: jnp.sum(victim.predict(images)[:, 0]))(images)
        return jnp.max(jnp.abs(jnp.diff(gradient, axis=0)))

    # Twice as many points on the way halve the differences of a continuous gradient; where a unit
    # switches, they stay.
    assert largest_jump(257) < 0.6 * largest_jump(129)
