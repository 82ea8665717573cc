"""The speed of the joint solve against the nested method, on the trained generator."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

import jdeq
from experiments.common.data import ImageData
from experiments.common.optimisers import cosine_adam
from experiments.common.speed import (
    Candidate,
    Comparison,
    Problems,
    compare,
    joint_candidate,
    nested_candidate,
    published_candidate,
)
from experiments.generative.config import Config
from experiments.generative.problem import Generator

PyTree = Any

_VALIDATION = 128  # further test images, at most, that the methods are tuned on
_PUBLISHED_STEPS = 50
_PUBLISHED_RATE = 1.0


def measure_speed(
    generator: Generator, params: PyTree, data: ImageData, config: Config
) -> Comparison:
    """Time joint, tuned nested and published nested on test images, tuned on other test images."""
    validation, test = speed_problems(generator, params, data, config)
    return compare(
        generator.problem,
        validation=validation,
        test=test,
        joint=joint_candidates(config),
        nested=nested_candidates(config),
        published=published_candidate(optax.adam(_PUBLISHED_RATE), _PUBLISHED_STEPS),
    )


def speed_problems(
    generator: Generator, params: PyTree, data: ImageData, config: Config
) -> tuple[Problems, Problems]:
    """Test images to tune methods on, and others to time them on."""
    count = min(config.speed_problems, 3 * len(data.test) // 4)
    images = data.test.first(count + _VALIDATION)

    def problems(images: Any) -> Problems:
        x0, z0 = generator.start(params, len(images))
        return Problems(params, jnp.asarray(images), x0, z0)

    return problems(images[count:]), problems(images[:count])


def joint_candidates(config: Config) -> list[Candidate]:
    """Adam with a cosine-decayed step inside the augmented map, over lengths and relaxations."""
    return [
        joint_candidate(
            f"Adam, cosine over {steps}, relaxation {relaxation:g}",
            jdeq.joint.Descent(
                cosine_adam(1.0, steps), state_relaxation=relaxation, adjoint_relaxation=relaxation
            ),
            steps,
            config.speed_joint_rates,
        )
        for steps in config.speed_joint_steps
        for relaxation in config.speed_relaxations
    ]


def nested_candidates(config: Config) -> list[Candidate]:
    """Adam as usual, and with the short memory and the decay that suit the joint solve."""
    rates, lengths = config.speed_nested_rates, config.speed_nested_steps
    usual = nested_candidate("Adam", optax.adam(1.0), max(lengths), rates)
    decayed = [
        nested_candidate(f"Adam, cosine over {steps}", cosine_adam(1.0, steps), steps, rates)
        for steps in lengths
    ]
    return [usual, *decayed]
