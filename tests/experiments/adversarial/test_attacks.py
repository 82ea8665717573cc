"""Attacks: feasible, exact at radius zero, right where the answer is known, clear on mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.adversarial.attacks import (
    FGSM,
    PGD,
    Attacked,
    Joint,
    Noise,
    Transfer,
    Victim,
    attack,
    in_batches,
    random_start,
)
from experiments.adversarial.problem import Ball, build_network, split_network
from tests.experiments.adversarial.conftest import SIZES

NORMS = ("l2", "linf")
STEPS = 6


def attacks(norm, victim):
    return {
        "joint": Joint(norm, STEPS, rate=4.0, momentum=0.8, hold=1),
        "pgd": PGD(norm, STEPS, momentum=0.7, restarts=2),
        "fgsm": FGSM(norm),
        "noise": Noise(norm, restarts=2),
        "transfer": Transfer(victim, FGSM(norm)),
    }


def length(perturbation, norm):
    flat = np.abs(perturbation.reshape(len(perturbation), -1)).astype(np.float64)
    return np.sqrt((flat**2).sum(-1)) if norm == "l2" else flat.max(-1)


@pytest.mark.parametrize("norm", NORMS)
def test_perturbations_stay_in_ball_and_box(victim, images, labels, norm):
    for name, method in attacks(norm, victim).items():
        for radius in (0.05, 0.5, 3.0):
            found = attack(method, victim, images, labels, radius, batch_size=12)
            assert length(found.perturbation, norm).max() <= radius + 1e-6, name
            assert length(found.images - images, norm).max() <= radius + 1e-6, name
            assert found.images.min() >= 0, name
            assert found.images.max() <= 1, name
            assert np.abs(found.perturbation).max() > 0.01, name


@pytest.mark.parametrize("norm", NORMS)
def test_radius_zero_is_the_clean_answer_exactly(victim, images, labels, norm):
    clean = np.asarray(victim.predict(jnp.asarray(images)))
    for name, method in attacks(norm, victim).items():
        found = attack(method, victim, images, labels, 0.0, batch_size=12)
        np.testing.assert_array_equal(found.logits, clean, name)
        np.testing.assert_array_equal(found.images, images, name)


@pytest.mark.parametrize("norm", NORMS)
def test_joint_and_pgd_find_more_than_one_step_and_noise(victim, images, labels, norm):
    radius = {"l2": 1.0, "linf": 0.2}[norm]
    losses = {
        name: attack(method, victim, images, labels, radius, batch_size=12).loss.mean()
        for name, method in {**attacks(norm, victim), "joint": Joint(norm, 20)}.items()
    }
    clean = attack(FGSM(norm), victim, images, labels, 0.0, batch_size=12).loss.mean()
    assert clean < losses["noise"] < losses["fgsm"]
    assert min(losses["joint"], losses["pgd"]) >= 0.999 * losses["fgsm"]


class Halfway(nnx.Module):
    """A state that moves half the way to the image: z* = image, and logits `W z*`."""

    def __init__(self, weights):
        self.weights = nnx.Param(weights)

    def cell(self, z, x):
        return 0.5 * z + 0.5 * x

    def head(self, z):
        return z.reshape(len(z), -1) @ self.weights[...]

    def initial_state(self, batch):
        return jnp.zeros((batch, 2, 2, 1))


@pytest.mark.parametrize("norm", NORMS)
def test_the_worst_perturbation_of_a_linear_classifier(norm):
    """Of two classes it is the radius times the dual direction of their difference."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)), jnp.float32)
    victim = Victim(*split_network(Halfway(weights), SIZES))
    image = jnp.full((1, 2, 2, 1), 0.5)
    ball = Ball(image, jnp.array([0.1]))
    difference = np.asarray(weights[:, 1] - weights[:, 0])
    best = difference / np.linalg.norm(difference) if norm == "l2" else np.sign(difference)
    label, zero = jnp.zeros(1, jnp.int32), jnp.zeros_like(image)
    for method in (Joint(norm, 30), PGD(norm, 30)):
        u = method.search(victim, label, ball, zero)
        # In units of the radius; float32, after 30 projected steps.
        np.testing.assert_allclose(np.ravel(u), best, atol=1e-5)


def test_restarts_go_on_with_survivors_and_keep_what_fools(victim, images, labels):
    calls = []

    class Scripted:
        norm, restarts, random_start = "l2", 3, False

        def search(self, victim, labels, ball, u0):
            calls.append((len(labels), bool(jnp.any(u0 != 0))))
            return jnp.zeros_like(u0) if len(calls) < 3 else jnp.ones_like(u0)

    found = attack(Scripted(), victim, images, labels, 2.0, batch_size=12)
    assert calls == [(12, False), (12, True), (12, True)]
    assert not np.array_equal(found.images, images)
    clean = attack(FGSM(), victim, images, labels, 0.0, batch_size=12)
    assert (~found.correct(labels) | (found.loss >= clean.loss)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball(norm):
    ball = Ball(jnp.full((400, 4, 4, 1), 0.5), jnp.full(400, 0.2))
    u = np.asarray(random_start(jax.random.key(0), ball, norm))
    lengths = length(u, norm)
    assert lengths.max() <= 1 + 1e-6
    # Of 16 dimensions a share 0.9^16 lies within 0.9 of the radius.
    assert np.mean(lengths < 0.9) == pytest.approx(0.9**16, abs=0.08)
    assert np.abs(u.mean(0)).max() < 0.15


def test_batches_are_joined_in_order():
    sizes = []

    def double(x):
        sizes.append(len(x))
        return Attacked(2 * x, x, x, x)

    found = in_batches(3, double, np.arange(7.0, dtype=np.float32))
    np.testing.assert_array_equal(found.images, 2 * np.arange(7.0))
    assert sizes == [3, 3, 3]


def test_predict_takes_the_gradient_of_the_equilibrium(victim, images):
    x = jnp.asarray(images[2:4])

    def logit(x):
        return jnp.sum(victim.predict(x)[:, 3])

    gradient = jax.jit(jax.grad(logit))(x)
    direction = jax.random.normal(jax.random.key(0), x.shape)
    step = 1e-2
    numeric = (logit(x + step * direction) - logit(x - step * direction)) / (2 * step)
    assert float(jnp.vdot(gradient, direction)) == pytest.approx(float(numeric), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y + 10, 1.0), "classes 0 to 9"),
        (lambda x, y: (x, y - 10, 1.0), "classes 0 to 9"),
        (lambda x, y: (x, y[:3], 1.0), "one integer for each"),
        (lambda x, y: (x, y.astype(float), 1.0), "one integer for each"),
        (lambda x, y: (x + 0.5, y, 1.0), r"box is \[0, 1\]"),
        (lambda x, y: (x - 0.5, y, 1.0), r"box is \[0, 1\]"),
        (lambda x, y: (np.where(x > 0.9, np.nan, x), y, 1.0), "NaN pixels"),
        (lambda x, y: ((255 * x).astype(np.uint8), y, 1.0), "divide 8-bit pixels by 255"),
        (lambda x, y: (x[:, :4], y, 1.0), "the model takes"),
        (lambda x, y: (x, y, -1.0), "at least 0"),
        (lambda x, y: (x, y, np.nan), "at least 0"),
    ],
)
def test_mistakes_are_named(victim, images, labels, change, message):
    with pytest.raises(ValueError, match=message):
        attack(Joint(), victim, *change(images, labels))


def test_another_seed_is_another_model():
    first, second = (jax.tree.leaves(build_network(SIZES, seed)[1]) for seed in (0, 1))
    assert any(bool(jnp.any(a != b)) for a, b in zip(first, second, strict=True))
