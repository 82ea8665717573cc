"""The speed of the joint attack, and of training with it, against PGD."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adversarial.attacks import PGD, Joint, Victim, published_pgd
from experiments.adversarial.config import Config
from experiments.adversarial.problem import Ball
from experiments.adversarial.train import initial_state, step_of
from experiments.common.data import ImageData, batches
from experiments.common.parallel import Devices
from experiments.common.speed import (
    Candidate,
    Comparison,
    Problems,
    compare,
    joint_candidate,
    nested_candidate,
)
from jdeq.joint import InnerSolve
from jdeq.solvers import Picard

_VALIDATION = 128  # further test images, at most, that the methods are tuned on
_REPEATS = 5
_NESTED_RTOL = 1e-3  # of the tuned nested attack's solves


def measure_speed(victim: Victim, data: ImageData, config: Config) -> Comparison:
    """Time joint, tuned nested and published nested attacks, tuned on other test images."""
    count = min(config.speed_problems, 3 * len(data.test) // 4)
    images = data.test.first(count + min(count, _VALIDATION))
    assert data.test.labels is not None
    labels = data.test.labels[: len(images)]

    def problems(images: np.ndarray, labels: np.ndarray) -> Problems:
        ball = Ball(jnp.asarray(images), jnp.full(len(images), config.radius, jnp.float32))
        start = victim.network.start(victim.params, len(images))
        return Problems(victim.params, jnp.asarray(labels), jnp.zeros_like(ball.image), start, ball)

    return compare(
        victim.network.problems[config.norm],
        validation=problems(images[count:], labels[count:]),
        test=problems(images[:count], labels[:count]),
        joint=joint_candidates(config),
        nested=nested_candidates(config),
        published=published_candidate(config),
    )


def joint_candidates(config: Config) -> list[Candidate]:
    """Joint attacks of several momenta and relaxations."""
    steps = config.speed_joint_steps
    return [
        joint_candidate(
            f"joint, cosine over {steps}, momentum {momentum:g}, relaxed by {relaxation:g}",
            Joint(config.norm, steps, 1.0, momentum, config.attack_hold, relaxation).method,
            steps,
            config.speed_joint_rates,
        )
        for momentum in config.speed_momenta
        for relaxation in config.speed_relaxations
    ]


def nested_candidates(config: Config) -> list[Candidate]:
    """PGD without and with the momenta of the joint attack, its solves by Anderson or Picard.

    On a contraction Picard's plain iteration takes a few steps more than Anderson's, but cheaper
    ones.
    """
    inner = {
        "Anderson": InnerSolve(rtol=_NESTED_RTOL, warm_start=True),
        "Picard": InnerSolve(Picard(), rtol=_NESTED_RTOL, warm_start=True),
    }
    return [
        nested_candidate(
            f"PGD, momentum {momentum:g}, {name}",
            PGD(config.norm, config.speed_nested_steps, 1.0, momentum).optimizer,
            config.speed_nested_steps,
            config.speed_nested_rates,
            solve,
        )
        for momentum in (0.0, *config.speed_momenta)
        for name, solve in inner.items()
    ]


def published_candidate(config: Config) -> Candidate:
    """The published baseline."""
    published = published_pgd(config.norm)
    return nested_candidate(
        f"PGD-{published.steps}, cold solves",
        published.optimizer,
        published.steps,
        inner=published.inner,
    )


def epoch_seconds(victim: Victim, data: ImageData, config: Config, seed: int) -> dict[str, float]:
    """Seconds of an epoch of training with each method.

    Steps of both methods are timed in turns, and their medians multiplied by the steps of an epoch.

    Returns:
        `joint`, and `pgd` with the published attack and solves, whatever the run was trained with.
    """
    variants = {"joint": config, "pgd": config.with_published_pgd()}
    devices = Devices(config.batch_size)
    batch = devices.spread(next(batches(data.train, config.batch_size, seed)))
    state = initial_state(config, victim.params, seed)
    # Past the ramp, at the full radius.
    state = devices.place(state._replace(step=jnp.asarray(config.steps, jnp.int32)))
    steps = {
        model: jax.jit(step_of(settings, victim.network, model))
        for model, settings in variants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        jax.block_until_ready(step(state, batch))  # compiles
    for _ in range(_REPEATS):
        for name, step in steps.items():
            started = time.perf_counter()
            jax.block_until_ready(step(state, batch))
            seconds[name].append(time.perf_counter() - started)
    per_epoch = len(data.train) / config.batch_size
    return {name: float(np.median(spent)) * per_epoch for name, spent in seconds.items()}
