"""The metrics of the steps since the last row: fetched late, so that no step waits for the host."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common.non_finite import CULPRIT

PyTree = Any
Metrics = dict[str, jax.Array]
Row = dict[str, float] | None

SKIPPED = "skipped_steps"
"""The metric that counts the steps of a row that were left out."""


class Step(NamedTuple):
    """A step that was not finite.

    Attributes:
        step: Its number, from 1.
        number: The value of `CULPRIT`.
        batch: What it was given.
        metrics: Its metrics.
    """

    step: int
    number: int
    batch: PyTree
    metrics: Metrics


class MetricsWindow:
    """Collects metrics step by step, and means over those that were finite.

    Args:
        rows: What `rows` returned when the checkpoint was saved from which training continues.
    """

    def __init__(self, rows: list[Row]):
        self._rows = list(rows)
        self._finite: list[Metrics | None] = []
        self._in_flight: deque[tuple[int, PyTree, Metrics]] = deque()

    def add(self, step: int, batch: PyTree, metrics: Metrics) -> None:
        """A step was started on the device."""
        self._in_flight.append((step, batch, metrics))

    def settle(self, in_flight: int) -> Step | None:
        """Wait until at most so many steps are still computed.

        Returns:
            None, or the first finished step that was not finite, each of them once; it is left out
            of the means.
        """
        while len(self._in_flight) > in_flight:
            step, batch, metrics = self._in_flight.popleft()
            number = int(metrics[CULPRIT])
            if number >= 0:
                self._finite.append(None)
                return Step(step, number, batch, metrics)
            self._finite.append({name: metrics[name] for name in metrics if name != CULPRIT})
        return None

    def rows(self) -> list[Row]:
        """The metrics of each step since the last row, as JSON can hold them; None if left out."""
        fetched = jax.device_get(self._finite)
        self._finite.clear()
        self._rows += [
            None if row is None else {name: float(value) for name, value in row.items()}
            for row in fetched
        ]
        return self._rows

    def mean(self, count_skipped: bool) -> dict[str, float]:
        """The next row: means since the last one, which are dropped; empty if all were left out.

        Args:
            count_skipped: Whether `SKIPPED` is one of them.
        """
        rows = self.rows()
        kept = [row for row in rows if row is not None]
        means = {name: float(np.mean([row[name] for row in kept])) for name in (kept or [{}])[0]}
        skipped = {SKIPPED: float(len(rows) - len(kept))} if count_skipped else {}
        self._rows = []
        return means | skipped if kept else {}
