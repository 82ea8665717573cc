"""What the backward pass of the reversible gradient has to know of the forward one."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jdeq import _tree
from jdeq.solution import Result, Solution
from jdeq.solvers.base import Solver

PyTree = Any

MARKS = 64
"""Residual norms kept of a solve, however long it is."""


class Record(NamedTuple):
    """The memory of a solver and what happened so far, every leaf ``[B, ...]``.

    Attributes:
        state: the solver's memory.
        previous: the state before the last iterate.
        before: the state before the iterate of least residual.
        best_step: the step of that iterate, int32 ``[B]``.
        lowest: its residual, ``[B]``.
        marks: residuals of the steps that are multiples of ``stride``, in order, ``[B, MARKS]``.
        stride: a power of two that doubles whenever the marks are full, int32 ``[B]``.
    """

    state: PyTree
    previous: PyTree
    before: PyTree
    best_step: Array
    lowest: Array
    marks: Array
    stride: Array

    def before_solution(self, solution: Solution) -> tuple[PyTree, Array]:
        """The state before the solution's value, and the step of that value."""
        converged = solution.result == Result.converged
        below = _tree.select(converged, self.previous, self.before)
        return below, jnp.where(converged, solution.steps - 1, self.best_step)

    def agrees(self, k: Array, residual: Array, tolerance: float) -> Array:
        """Whether a residual is finite and, if one was noted at step ``k``, near it: ``[B]``."""
        slot = jnp.clip(k // self.stride, 0, MARKS - 1)
        mark = jnp.take_along_axis(self.marks, slot[:, None], axis=1)[:, 0]
        near = jnp.abs(residual - mark) <= tolerance * mark
        return jnp.isfinite(residual) & (near | (k % self.stride != 0))


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A solver whose memory is the previous state, with a record of the steps that it takes."""

    solver: Solver

    def init(self, z: PyTree) -> Record:
        """The solver's own memory, and nothing noted yet."""
        state = self.solver.init(z)
        size = _tree.norm(z)
        return Record(
            state=state,
            previous=state,
            before=state,
            best_step=jnp.zeros(size.shape, jnp.int32),
            lowest=jnp.full_like(size, jnp.inf),
            marks=jnp.zeros((*size.shape, MARKS), size.dtype),
            stride=jnp.ones(size.shape, jnp.int32),
        )

    def step(self, z: PyTree, fz: PyTree, memory: Record, k: Array) -> tuple[PyTree, Record]:
        """The solver's step, noted."""
        z_next, state = self.solver.step(z, fz, memory.state, k)
        residual = _tree.norm(_tree.subtract(fz, z))
        better = residual < memory.lowest
        marks, stride = _note(memory.marks, memory.stride, residual, k)
        return z_next, Record(
            state=state,
            previous=memory.state,
            before=_tree.select(better, memory.state, memory.before),
            best_step=jnp.where(better, k, memory.best_step),
            lowest=jnp.where(better, residual, memory.lowest),
            marks=marks,
            stride=stride,
        )


def _note(marks: Array, stride: Array, residual: Array, k: Array) -> tuple[Array, Array]:
    """The marks with step ``k`` among them, if its turn has come; every other one goes if full."""
    full = k == MARKS * stride
    thinned = jnp.concatenate([marks[:, ::2], jnp.zeros_like(marks[:, ::2])], axis=1)
    marks = jnp.where(full[:, None], thinned, marks)
    stride = jnp.where(full, 2 * stride, stride)
    due = (k % stride == 0)[:, None] & (jnp.arange(MARKS) == (k // stride)[:, None])
    return jnp.where(due, residual[:, None], marks), stride
