"""Progress of training: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.common import hosts
from experiments.common.terminal import console, say

_LINES = 10  # lines a training leaves in a log file


class TrainingProgress(Protocol):
    """What the loop tells."""

    def advance(self, step: int) -> None:
        """A step was started on the device."""

    def report(self, step: int, loss: float) -> None:
        """The mean loss since the last report is known."""


@contextmanager
def training_progress(steps: int, start: int) -> Iterator[TrainingProgress]:
    """The progress of steps `start` to `steps`, with rate and remaining time."""
    if not (console.is_terminal and hosts.is_first()):
        yield _Lines(steps, start)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} steps/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress, steps, start)


class _Bar:
    def __init__(self, progress: Progress, steps: int, start: int):
        self._progress = progress
        self._task = progress.add_task("", total=steps, completed=start, loss="-", rate="-")
        self._rate = _Rate(start)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def report(self, step: int, loss: float) -> None:
        self._progress.update(self._task, loss=f"{loss:.4g}", rate=f"{self._rate(step):.3g}")


class _Lines:
    def __init__(self, steps: int, start: int):
        self._steps = steps
        self._rate = _Rate(start)
        self._printed = start * _LINES // steps

    def advance(self, step: int) -> None:
        pass

    def report(self, step: int, loss: float) -> None:
        if step * _LINES // self._steps == self._printed:
            return
        self._printed = step * _LINES // self._steps
        rate = self._rate(step)
        say(
            f"step {step} of {self._steps}  loss {loss:.4g}  {rate:.3g} steps/s  "
            f"{(self._steps - step) / rate:.0f} s left"
        )


class _Rate:
    """Steps per second since the last call; the first includes compilation."""

    def __init__(self, step: int):
        self._step, self._time = step, time.perf_counter()

    def __call__(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate
