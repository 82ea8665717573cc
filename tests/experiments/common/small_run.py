"""Runs of the small trainings, and their command line: `python -m tests...small_run`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.cli import Summary, Task, main
from experiments.common.runs import RunDirectory
from experiments.common.training import Batches, Schedule, fit
from tests.experiments.common.small_tasks import TASKS


@dataclass(frozen=True)
class Settings:
    training: str = "generative"
    steps: int = 6
    log_every: int = 2
    checkpoint_every: int = 2
    pause: float = 0.0


class Slow:
    """The same batches, each after a pause."""

    def __init__(self, batches: Batches, pause: float):
        self._batches, self._pause = batches, pause
        self.size = batches.size

    def __next__(self) -> Any:
        time.sleep(self._pause)
        return next(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def train(settings: Settings, run: RunDirectory, data_root: Path | None) -> None:
    del data_root
    training = TASKS[settings.training]()
    schedule = Schedule(settings.steps, settings.log_every, settings.checkpoint_every)
    fit(training.update, training.state, Slow(training.batches, settings.pause), run, schedule)


def evaluate(settings: Settings, run: RunDirectory, data_root: Path | None) -> Summary:
    raise AssertionError("only training is tested")


TASK = Task(
    name="small",
    description="Train a small model.",
    presets={
        **{name: Settings(training=name) for name in TASKS},
        "slow": Settings(steps=20, log_every=2, checkpoint_every=4, pause=0.3),
    },
    default="generative",
    train=train,
    evaluate=evaluate,
)

if __name__ == "__main__":
    main(TASK)
