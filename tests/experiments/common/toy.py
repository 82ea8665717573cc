"""A task that trains a line in a second, and its command line: `python -m tests...toy`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.checkpoints import restore_newest
from experiments.common.cli import Summary, Task, main
from experiments.common.data import ArrayImages, Split, batches
from experiments.common.runs import RunDirectory
from experiments.common.training import Batches, Schedule, fit

PAUSE = "JDEQ_TOY_PAUSE"


@dataclass(frozen=True)
class Settings:
    steps: int = 40
    learning_rate: float = 0.05
    log_every: int = 5
    checkpoint_every: int = 10
    pauses: bool = False  # for as many seconds as PAUSE of the environment says
    sizes: tuple[int, ...] = (3, 4)
    poisoned: int | None = None  # the image that has a NaN


class State(NamedTuple):
    params: dict[str, jax.Array]
    optimizer: optax.OptState
    key: jax.Array


def optimizer(settings: Settings) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))


def initial(settings: Settings, seed: int) -> State:
    key, draw = jax.random.split(jax.random.key(seed))
    params = {"weight": jax.random.normal(draw, settings.sizes)}
    return State(params, optimizer(settings).init(params), key)


def image_order(settings: Settings, seed: int) -> Batches:
    pixels = np.random.default_rng(0).random((30, 1, 3, 1), np.float32)
    if settings.poisoned is not None:
        pixels[settings.poisoned] = np.nan
    return batches(Split(ArrayImages(pixels)), 4, seed)


def step_of(settings: Settings):
    def update(state: State, batch: dict[str, jax.Array]):
        key, draw = jax.random.split(state.key)
        inputs = batch["image"][:, 0, :, 0]
        noise = 0.1 * jax.random.normal(draw, (4, settings.sizes[-1]))

        def loss(params):
            return jnp.mean((inputs @ params["weight"] + noise - 1) ** 2)

        value, gradient = jax.value_and_grad(loss)(state.params)
        if settings.pauses:
            jax.debug.callback(lambda: time.sleep(float(os.environ.get(PAUSE, "0.05"))))
        updates, memory = optimizer(settings).update(gradient, state.optimizer)
        return State(optax.apply_updates(state.params, updates), memory, key), {"loss": value}

    return update


def train(settings: Settings, run: RunDirectory, data_root: Path | None) -> None:
    del data_root
    seed = run.record.seed
    schedule = Schedule(settings.steps, settings.log_every, settings.checkpoint_every)
    fit(step_of(settings), initial(settings, seed), image_order(settings, seed), run, schedule)


def evaluate(settings: Settings, run: RunDirectory, data_root: Path | None) -> Summary:
    del data_root
    restored = restore_newest(run.checkpoints, initial(settings, run.record.seed), discard=False)
    assert restored is not None
    return {"sum": float(restored.state.params["weight"].sum()), "step": restored.step}


TASK = Task(
    name="toy",
    description="Train a line.",
    presets={
        "fast": Settings(),
        "slow": Settings(pauses=True),
        "long": Settings(steps=1200, checkpoint_every=4, pauses=True),
        "undisturbed": Settings(steps=1200, checkpoint_every=600, pauses=True),
        "explosive": Settings(learning_rate=1e30),
        "poisoned": Settings(poisoned=7),
        "large": Settings(sizes=(3, 40_000)),
    },
    default="fast",
    train=train,
    evaluate=evaluate,
)

if __name__ == "__main__":
    main(TASK)
