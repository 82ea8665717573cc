"""Training: the gradient is that of the loss at the attacked images, and only attacks differ."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.adversarial.attacks import Victim
from experiments.adversarial.config import PRESETS
from experiments.adversarial.problem import Ball, cross_entropy, split_network
from experiments.adversarial.train import (
    MODELS,
    initial_state,
    joint_attack,
    pgd_attack,
    step_of,
    training_loss,
)
from tests.experiments.adversarial.conftest import SIZES

CONFIG = replace(PRESETS["smoke"], joint_steps=25, pgd_steps=12)
RADIUS = 0.5


class Smooth(nnx.Module):
    """`z* = tanh(z* / 2 + W x)`: the worst images lie on no kink, where gradients jump."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        self.injection = nnx.Param(0.3 * jax.random.normal(keys[0], (64, 12)))
        self.classifier = nnx.Param(jax.random.normal(keys[1], (12, 10)))

    def cell(self, z, x):
        return jnp.tanh(0.5 * z + x.reshape(len(x), -1) @ self.injection[...])

    def head(self, z):
        return z @ self.classifier[...]

    def initial_state(self, batch):
        return jnp.zeros((batch, 12))


def attacked(model, victim, batch):
    """The images that a model's loss is taken at, found by the attack that it trains with."""
    ball = Ball(batch["image"], jnp.full(len(batch["image"]), RADIUS))
    if model == "clean":
        return batch["image"]
    attack = {"joint": joint_attack, "pgd": pgd_attack}[model](CONFIG)
    return ball.perturbed(attack.search(victim, batch["label"], ball, jnp.zeros_like(ball.image)))


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_is_that_at_the_attacked_images(images, labels, model):
    victim = Victim(*split_network(Smooth(), SIZES))
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    found = attacked(model, victim, batch)

    def loss(params):
        return jnp.mean(cross_entropy(victim.network.predict(params, found), batch["label"]))

    expected = jax.jit(jax.value_and_grad(loss))(victim.params)
    keys = jax.random.split(jax.random.key(0), len(images))
    (value, _), gradient = jax.jit(
        jax.value_and_grad(
            lambda params: training_loss(
                params, CONFIG, victim.network, model, batch, jnp.float32(RADIUS), keys
            ),
            has_aux=True,
        )
    )(victim.params)
    assert float(value) == pytest.approx(float(expected[0]), rel=0.01)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
        scale = float(jnp.linalg.norm(other))
        assert float(jnp.linalg.norm(one - other)) <= 0.03 * scale


def test_a_step_keeps_the_cell_a_contraction_and_counts(victim, images, labels):
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    state = initial_state(CONFIG, victim.params, 0)
    new, metrics = jax.jit(step_of(CONFIG, victim.network, "clean"))(state, batch)
    assert int(new.step) == 1
    assert np.isfinite(float(metrics["loss"]))
    contracted = victim.network.contract(new.params)
    for one, other in zip(jax.tree.leaves(contracted), jax.tree.leaves(new.params), strict=True):
        # Contracted once more, a kernel is rescaled by rounding alone, in float32.
        np.testing.assert_allclose(one, other, rtol=1e-5)
