"""What a run measured while it trained: `metrics.jsonl`, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from experiments.common import hosts
from experiments.common.errors import UserError, reason
from experiments.common.files import to_json, write_atomically

_METRICS = "metrics.jsonl"
_EVENTS = "tensorboard"


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard.

    What an interrupted run logged after its checkpoint is dropped first, so that a resumed run's
    files read as if nothing had happened: every logged step once. TensorBoard's file is written
    anew; its times are those of the training, `seconds` in a row, whatever the clock did.

    Args:
        run: Path of the run directory.
        step: The step training starts from: 0, or that of the checkpoint.

    Raises:
        UserError: They cannot be written; so do the methods.
    """

    def __init__(self, run: Path, step: int):
        self._path = run / _METRICS
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        with self._one_sentence():
            text = "".join(to_json(row) + "\n" for row in kept)
            write_atomically(self._path, text.encode())
            self._file = self._path.open("a")
            # tensorboardX's own writer hangs on a full disk, whose thread dies of it.
            self._events = EventsWriter(str(_emptied(run / _EVENTS) / "events"))
            self._began = time.time() - (kept[-1].get("seconds", 0.0) if kept else 0.0)
            for row in kept:
                self._add_events(row)
            self._events.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log one row."""
        row = {"step": step, **values}
        with self._one_sentence():
            self._file.write(to_json(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # before the checkpoint of this step
            self._add_events(row)
            self._events.flush()

    def close(self) -> None:
        """Flush and close both."""
        with self._one_sentence():
            try:
                self._file.close()
            finally:
                self._events.close()

    def _add_events(self, row: dict[str, float]) -> None:
        seconds = row.get("seconds", 0.0)
        for name, value in row.items():
            if name != "step" and value is not None:  # null stands for NaN
                event = Event(step=int(row["step"]), summary=scalar(name, value))
                event.wall_time = self._began + seconds
                self._events.write_event(event)

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"metrics cannot be written to {self._path.parent} ({reason(error)}); make room, "
                "or the directory writable, and continue with --resume."
            ) from error


class NoLog:
    """What all processes but the first log to: nothing."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def metrics_log(run: Path, step: int) -> MetricsLog | NoLog:
    """The log of a run, see `MetricsLog`; process 0 alone writes it."""
    return MetricsLog(run, step) if hosts.is_first() else NoLog()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run directory's `metrics.jsonl`; a last line cut off by a crash is left out."""
    file = path / _METRICS
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _emptied(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in folder.glob("events.*"):
        file.unlink()
    return folder
