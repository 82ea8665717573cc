"""The trace of a solve, written row by row inside its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq._standing import Report
from jdeq.solution import History

PyTree = Any
Record = bool | Callable[[PyTree], PyTree]
"""Whether the history is kept; a function of the iterate is recorded besides."""


def empty(start: PyTree, report: Report, max_steps: int, record: Record) -> History | None:
    """A history without rows for reports like ``report``, or None if none is kept."""
    if record is False:
        return None

    def rows(leaf: Any) -> Array:
        return jnp.full((max_steps, *leaf.shape), jnp.nan, leaf.dtype)

    recorded = None
    if callable(record):
        shapes = jax.eval_shape(record, start)
        recorded = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), shapes)
    return History(jax.tree.map(rows, report.residual), rows(report.merit), recorded)


def write(
    history: History | None,
    k: Array,
    column: Array | None,
    current: PyTree,
    report: Report,
    active: Array,
    record: Record,
) -> History | None:
    """The history with row ``k``.

    Args:
        history: what is there so far, or None.
        k: the step.
        column: the column of each problem, or None where all problems are there in order.
        current: the iterate that ``report`` is about.
        report: what is written.
        active: problems that go on, bool ``[B]``; the others get NaN.
        record: see ``Record``.

    Returns:
        The new history, or None.
    """
    if history is None:
        return None

    def put(rows: Array, row: Array) -> Array:
        if column is not None:
            return rows.at[k, column].set(row.astype(rows.dtype))
        return lax.dynamic_update_index_in_dim(rows, row.astype(rows.dtype), k, 0)

    def put_active(rows: Array, row: Array) -> Array:
        return put(rows, jnp.where(active, row, jnp.nan))

    recorded = history.record
    if callable(record):
        recorded = jax.tree.map(put, recorded, record(current))
    residual = jax.tree.map(put_active, history.residual, report.residual)
    return History(residual, put_active(history.merit, report.merit), recorded)
