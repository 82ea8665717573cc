"""Small learners and tasks for the tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.common.data.tasks import Characters, Tasks, TaskSampler
from experiments.meta.config import PRESETS, Config
from experiments.meta.problem import Learner, build_learner
from experiments.meta.sinusoid import SinusoidSampler

CLASSES = replace(PRESETS["smoke"], channels=(12,), context=4, ways=3, inner_steps=20)
SINUSOID = replace(PRESETS["sinusoid"], channels=(12,), context=4, shots=6, queries=5, tasks=3)


def classes(count: int = 6, images: int = 8, numbers: int = 5) -> Characters:
    random = np.random.default_rng(0)
    centres = random.normal(size=(count, 1, numbers))
    stacks = centres + 0.5 * random.normal(size=(count, images, numbers))
    return Characters(tuple(f"c{i}" for i in range(count)), tuple(stacks.astype(np.float32)))


def learner_of(config: Config) -> tuple[Learner, dict, Tasks]:
    """A learner, its initial parameters, and a batch of three tasks."""
    if config.dataset == "sinusoid":
        tasks = SinusoidSampler(config.shots, config.queries, 0).first(3)
    else:
        tasks = TaskSampler(classes(), config.ways, 2, 3, seed=0).first(3)
    learner, params = build_learner(config, tasks.support.shape[2:], config.ways, seed=0)
    return learner, params, tasks
