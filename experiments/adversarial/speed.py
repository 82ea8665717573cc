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
from experiments.common.speed import (
    Candidate,
    Comparison,
    Problems,
    compare,
    joint_candidate,
    nested_candidate,
)

_VALIDATION = 128  # further test images, at most, that the methods are tuned on
_REPEATS = 5


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
    """Joint attacks of several lengths."""
    return [
        joint_candidate(
            f"joint, cosine over {steps}",
            Joint(config.norm, steps, rate=1.0).method,
            steps,
            config.speed_joint_rates,
        )
        for steps in config.speed_joint_steps
    ]


def nested_candidates(config: Config) -> list[Candidate]:
    """PGD at constant rates, and at rates that decay as the joint attack's do."""
    rates, lengths = config.speed_nested_rates, config.speed_nested_steps
    constant = PGD(config.norm, max(lengths), rate=1.0)
    candidates = [nested_candidate("PGD", constant.optimizer, max(lengths), rates)]
    for steps in lengths:
        optimizer = Joint(config.norm, steps, rate=1.0).method.optimizer
        assert optimizer is not None
        candidates.append(nested_candidate(f"PGD, cosine over {steps}", optimizer, steps, rates))
    return candidates


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
    batch = jax.tree.map(jnp.asarray, next(batches(data.train, config.batch_size, seed)))
    state = initial_state(config, victim.params, seed)
    # Past the ramp, at the full radius.
    state = state._replace(step=jnp.asarray(config.steps, jnp.int32))
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
