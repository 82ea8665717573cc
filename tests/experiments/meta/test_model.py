"""Sizes of the networks, and that their cells contract by construction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.meta.config import PRESETS
from experiments.meta.model import (
    CompactNetwork,
    DenseNetwork,
    MultiscaleNetwork,
    convolution_norm,
)
from experiments.meta.problem import Head, build_learner
from jdeq.nn import conv2d


def size(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))


def compact(contraction=0.9):
    return CompactNetwork(
        (10, 8, 1), channels=(8, 16), strides=(2, 1), context=4, contraction=contraction,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


def test_the_published_network_has_its_published_sizes():
    config = PRESETS["omniglot-published"]
    network = MultiscaleNetwork(
        (28, 28, 1), widths=config.channels, context=config.context, rngs=nnx.Rngs(0)
    )
    state = jax.eval_shape(lambda: network.initial_state(1, 5))
    assert [branch.shape for branch in state] == [(1, 5, 28, 28, 64), (1, 5, 14, 14, 128)]
    assert sum(branch.size for branch in state) == 5 * 75_264
    features = jax.eval_shape(network.features, state).shape[-1]
    assert features == 1536
    head = Head(features, 5, prototypes=False, rngs=nnx.Rngs(0))
    # The published cell's 2,490,688 hold 154,368 that modulate nothing.
    assert size(network.multiscale) == 2_490_688 - 154_368
    assert size(network) + size(head) == 2_345_093


def test_the_published_learner_adapts_its_context_of_400():
    config = PRESETS["omniglot-published"]

    learner, params = build_learner(config, (28, 28, 1), config.ways, 0)
    x0 = jax.eval_shape(lambda: learner.start(params, 2, 5, config.ways)[0])
    assert x0.context.shape == (2, 400)
    assert x0.head is None


def test_the_norm_of_a_convolution_is_its_largest_singular_value():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 4))
    matrix = jax.jacobian(lambda x: conv2d(x.reshape(1, 5, 4, 4), kernel).reshape(-1))(
        jnp.zeros(5 * 4 * 4)
    )
    expected = np.linalg.norm(np.asarray(matrix), 2)
    assert convolution_norm(kernel, (5, 4)) == pytest.approx(expected, rel=0.03)
    assert convolution_norm(kernel, (5, 4)) <= expected * (1 + 1e-5)


@pytest.mark.parametrize("build", [compact, None], ids=["compact", "dense"])
def test_cells_contract_at_every_context(build):
    if build is None:
        network = DenseNetwork(3, width=16, context=4, contraction=0.9, rngs=nnx.Rngs(0))
        network.recurrent.kernel[...] = 50 * network.recurrent.kernel[...]
        examples = jnp.ones((6, 3))
    else:
        network = build()
        network.recurrent.kernel[...] = 50 * network.recurrent.kernel[...]
        examples = jax.random.normal(jax.random.key(4), (6, 10, 8, 1))
    network.contract()
    injection = jax.tree.map(
        lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), network.inject(examples)
    )
    context = 10 * jax.random.normal(jax.random.key(1), (2, 4))
    zeros = network.initial_state(2, 3)
    first, second = (jax.random.normal(jax.random.key(k), zeros.shape) for k in (2, 3))
    for z in (first, 0.01 * first, zeros):
        before = jnp.linalg.norm((z - second).reshape(2, -1), axis=1)
        moved = network.cell(z, context, injection) - network.cell(second, context, injection)
        assert jnp.all(jnp.linalg.norm(moved.reshape(2, -1), axis=1) <= 0.9 * before)
        second = z + 1e-3 * second


def test_examples_of_a_task_share_its_context_alone():
    network = compact()
    injection = network.inject(jax.random.normal(jax.random.key(0), (6, 10, 8, 1)))
    injection = injection.reshape(2, 3, *injection.shape[1:])
    context = jax.random.normal(jax.random.key(1), (2, 4))
    z = jax.random.normal(jax.random.key(2), network.initial_state(2, 3).shape)
    whole = network.cell(z, context, injection)
    alone = network.cell(z[1:, 2:], context[1:], injection[1:, 2:])
    np.testing.assert_allclose(whole[1:, 2:], alone, atol=1e-6)
    other = network.cell(z, context.at[0].add(1.0), injection)
    np.testing.assert_array_equal(other[1], whole[1])
    assert jnp.max(jnp.abs(other[0] - whole[0])) > 1e-2
