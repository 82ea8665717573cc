"""The training loop that every task shares."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from experiments.common.checkpoints import CheckpointWriter, restore_newest
from experiments.common.errors import UserError
from experiments.common.parallel import DataParallel
from experiments.common.progress import training_progress
from experiments.common.runs import MetricsLog, RunDirectory
from experiments.common.terminal import say

PyTree = Any
Metrics = dict[str, jax.Array]


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved; `data.batches` makes one."""

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
    as one that was left alone: the state and the position in the data are all there is.

    Args:
        update: `update(state, batch) -> (state, metrics)`; it is compiled here, and gives up the
            buffers of its first argument. Metrics are scalars, among them `loss`; if one is not
            finite, training stops.
        state: Parameters, optimiser state, PRNG key: a pytree of arrays.
        batches: Where batches come from, at its beginning.
        run: Where metrics and checkpoints go.
        schedule: Steps in all, between rows of metrics and between checkpoints.

    Returns:
        (the state after the last step, seconds spent in training, interrupted spells included).

    Raises:
        UserError: A metric is not finite, a checkpoint cannot be restored or saved, or the batches
            do not divide by the number of devices.
        TrainingInterruptedError: Ctrl-C or SIGTERM; a checkpoint of the last step was saved.
    """
    step, seconds = 0, 0.0
    restored = restore_newest(run.checkpoints, state, discard=True)
    if restored is not None:
        step, state, notes = restored
        seconds = notes["seconds"]
        batches.set_state(notes["position"])
        say(f"continuing at step {step} of {schedule.steps}.")
    if step >= schedule.steps:
        return state, seconds
    writer = CheckpointWriter(run.checkpoints)
    log = MetricsLog(run, step)
    try:
        return _loop(update, state, step, seconds, batches, writer, log, schedule)
    finally:
        log.close()
        writer.close()


def _loop(
    update: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]],
    state: PyTree,
    step: int,
    seconds_before: float,
    batches: Batches,
    writer: CheckpointWriter,
    log: MetricsLog,
    schedule: Schedule,
) -> tuple[PyTree, float]:
    devices = DataParallel()
    compiled = devices.compile(update)
    state = devices.replicate(state)
    started = time.perf_counter()
    pending: list[Metrics] = []
    with _interruption() as interrupted, training_progress(schedule.steps, step) as progress:
        while step < schedule.steps:
            state, metrics = compiled(state, devices.spread(next(batches)))
            step += 1
            pending.append(metrics)
            # Two steps in flight keep the device busy, and memory and Ctrl-C's delay bounded.
            jax.block_until_ready(pending[-2:-1])
            writer.check()
            last = step == schedule.steps
            log_now = last or step % schedule.log_every == 0
            save_now = last or interrupted.is_set() or step % schedule.checkpoint_every == 0
            if log_now or save_now:
                row = _mean(pending, step)
            if log_now:
                spent = seconds_before + time.perf_counter() - started
                log.write(step, row | {"seconds": spent})
                progress.report(step, row["loss"])
                pending.clear()
            if save_now:
                seconds = seconds_before + time.perf_counter() - started
                writer.save(step, state, {"position": batches.get_state(), "seconds": seconds})
            if interrupted.is_set() and not last:
                raise TrainingInterruptedError(
                    f"stopped after step {step} of {schedule.steps}; it is saved"
                )
            progress.advance(step)
    return state, seconds


def _mean(pending: list[Metrics], step: int) -> dict[str, float]:
    """Means of the metrics since the last row; waits for the device."""
    rows = jax.device_get(pending)
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
    for name, column in columns.items():
        if not np.isfinite(column).all():
            first = step - len(column) + 1 + int(np.flatnonzero(~np.isfinite(column))[0])
            raise UserError(
                f"training stopped because {name} is {column[first - step - 1]} at step {first}; "
                "lower the learning rate or strengthen the regularisation in the preset "
                "(the checkpoints before that step are kept)."
            )
    return {name: float(column.mean()) for name, column in columns.items()}


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
