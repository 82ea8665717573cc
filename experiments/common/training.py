"""The training loop that every task shares."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from experiments.common import hosts
from experiments.common.checkpoints import CheckpointWriter, restore_newest
from experiments.common.errors import UserError
from experiments.common.interruption import interruption
from experiments.common.metrics_log import MetricsLog, NoLog, metrics_log
from experiments.common.non_finite import (
    NonFinite,
    culprit,
    guard,
    guarded,
    save_non_finite,
    skips_non_finite,
)
from experiments.common.parallel import Devices
from experiments.common.progress import training_progress
from experiments.common.runs import RunDirectory
from experiments.common.terminal import say
from experiments.common.window import Metrics, MetricsWindow

PyTree = Any

NON_FINITE = "non_finite"
"""Folder of a run directory: what steps that were not finite were given."""


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved; `data.batches` makes one.

    Attributes:
        size: Examples a batch, of all processes together.
    """

    size: int

    def __next__(self) -> PyTree: ...

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at this position."""


@dataclass(frozen=True)
class Schedule:
    """When what happens.

    Attributes:
        steps: Training steps in all.
        log_every: Steps between two rows of metrics; each row is the mean since the last.
        checkpoint_every: Steps between two checkpoints.
    """

    steps: int
    log_every: int
    checkpoint_every: int


class TrainingInterruptedError(Exception):
    """Training stopped at the user's wish; everything is saved."""


def fit(
    update: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]],
    state: PyTree,
    batches: Batches,
    run: RunDirectory,
    schedule: Schedule,
) -> tuple[PyTree, float]:
    """Train from the newest checkpoint of the run, or from `state` if there is none, to the end.

    With several devices each gets an equal part of every batch, and the state.

    A run that is killed at any moment and continued ends with the same bits on the same machine
    as one that was left alone: the state, the position in the data and the metrics since the last
    row are all there is.

    A step that is not finite stops training; what it was given is saved in `non_finite/` of the
    run, see `non_finite`. Inside `skip_non_finite(True)` it is left out and counted as
    `skipped_steps`; training stops when no step since the last row was finite.

    Args:
        update: `update(state, batch) -> (state, metrics)`; it is compiled here, and gives up the
            buffers of its first argument. Metrics are scalars, among them `loss`.
        state: Parameters, optimiser state, PRNG key: a pytree of arrays.
        batches: Where batches come from, at its beginning.
        run: Where metrics and checkpoints go.
        schedule: Steps in all, between rows of metrics and between checkpoints.

    Returns:
        (the state after the last step, seconds spent in training, interrupted spells included).

    Raises:
        UserError: A step is not finite, a checkpoint cannot be restored or saved, data cannot be
            read any more, or the batches do not divide by the number of devices.
        TrainingInterruptedError: Ctrl-C or SIGTERM; a checkpoint of the last step was saved.
    """
    notes: dict[str, Any] = {"seconds": 0.0}
    step = 0
    devices = Devices(batches.size)
    restored = restore_newest(run.checkpoints, devices.template(state), discard=True)
    if restored is not None:
        step, state, notes = restored
        batches.set_state(notes["position"])
        say(f"continuing at step {step} of {schedule.steps}.")
    if step >= schedule.steps:
        return state, notes["seconds"]
    with (
        closing(CheckpointWriter(run.checkpoints)) as writer,
        closing(metrics_log(run.path, step)) as log,
    ):
        training = _Training(
            update, state, step, notes, devices, batches, writer, log, run, schedule
        )
        training.run()
    hosts.wait("the last checkpoint")
    return training.state.state, training.seconds


class _Training:
    """The loop, and what it changes from step to step."""

    def __init__(
        self,
        update: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]],
        state: PyTree,
        step: int,
        notes: dict[str, Any],
        devices: Devices,
        batches: Batches,
        writer: CheckpointWriter,
        log: MetricsLog | NoLog,
        run: RunDirectory,
        schedule: Schedule,
    ):
        self._devices = devices
        self._skips = skips_non_finite()
        self._update = self._devices.compile(guarded(update, self._skips))
        self.state = self._devices.place(guard(state))
        self._step = self._saved = step
        self._window = MetricsWindow(notes.get("rows", []))
        self._seconds_before = notes["seconds"]
        self._started = time.perf_counter()
        self._batches, self._writer, self._log, self._run = batches, writer, log, run
        self._schedule = schedule
        self._not_finite = ""

    @property
    def seconds(self) -> float:
        """Time spent in training, interrupted spells included."""
        return self._seconds_before + time.perf_counter() - self._started

    def run(self) -> None:
        """Train to the last step, which is then saved."""
        schedule = self._schedule
        with interruption() as asked, training_progress(schedule.steps, self._step) as progress:
            while self._step < schedule.steps:
                batch = self._devices.spread(self._next_batch())
                self.state, metrics = self._update(self.state, batch)
                self._step += 1
                self._window.add(self._step, batch, metrics)
                # Two steps in flight keep the device busy, and memory and Ctrl-C's delay bounded.
                self._settle(in_flight=1)
                self._writer.check()
                last = self._step == schedule.steps
                stop = asked(self._step)
                if last or self._step % schedule.log_every == 0:
                    progress.report(self._step, self._write_row())
                if last or stop or self._step % schedule.checkpoint_every == 0:
                    self._save()
                if stop:
                    raise TrainingInterruptedError(
                        f"stopped after step {self._step} of {schedule.steps}; it is saved"
                    )
                progress.advance(self._step)

    def _next_batch(self) -> PyTree:
        try:
            return next(self._batches)
        except Exception as error:
            # Several processes save together or not at all, and the others know nothing of it.
            if hosts.count() == 1 and self._step > self._saved:
                self._save()
            if isinstance(error, UserError | OSError):
                raise UserError(
                    f"training stopped at step {self._step}, because its data cannot be read any "
                    f"more: {error}; the checkpoint of step {self._saved} is kept, continue with "
                    "--resume."
                ) from error
            raise

    def _settle(self, in_flight: int) -> None:
        """Wait until at most so many steps are computed, and see whether the others were finite."""
        while (found := self._window.settle(in_flight)) is not None:
            self._not_finite = culprit(found.number, found.metrics, self.state.state)
            if not self._skips:
                raise self._non_finite(found.step, found.batch)

    def _write_row(self) -> float:
        """Log the means since the last row; the loss among them."""
        self._settle(in_flight=0)
        row = self._window.mean(count_skipped=self._skips)
        if not row:
            raise UserError(
                f"training stopped because no step since the last row of metrics was finite, up to "
                f"step {self._step}: the last time it was {self._not_finite}; lower the learning "
                "rate or strengthen the regularisation in the preset of a new run."
            )
        self._log.write(self._step, row | {"seconds": self.seconds})
        return row["loss"]

    def _save(self) -> None:
        self._settle(in_flight=0)
        notes = {
            "position": self._batches.get_state(),
            "seconds": self.seconds,
            "rows": self._window.rows(),
        }
        self._writer.save(self._step, self.state.state, notes)
        self._saved = self._step

    def _non_finite(self, step: int, batch: PyTree) -> UserError:
        """Save what the step was given; its update, and those of the steps after, were withheld."""
        folder = self._run.path / NON_FINITE
        save_non_finite(folder, NonFinite(step, self.state.state, batch, self._not_finite))
        return UserError(
            f"training stopped because {self._not_finite} is not finite at step {step}; the state "
            f"before it and its batch are in {folder}, for "
            "experiments.common.non_finite.load_non_finite: lower the learning rate or strengthen "
            "the regularisation in the preset of a new run, or leave such steps out with --resume "
            "--skip-non-finite."
        )
