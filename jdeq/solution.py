"""What every solve returns: values, one outcome a problem, and the trace on request."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple

import jax
from jax import Array


class Result(enum.IntEnum):
    """How the solve of one problem ended; ``Solution.result`` holds one code a problem.

    Attributes:
        converged: every residual is within its tolerance.
        max_steps: the step limit, or the step budget, came first.
        stagnated: the residual stopped falling above the tolerance, as at the rounding floor; or
            a fixed-point iteration ran away, but from a value of which half the digits were found.
        diverged: the residual grew out of all proportion to where it started.
        non_finite: an evaluation gave NaN or infinity.
    """

    converged = 0
    max_steps = 1
    stagnated = 2
    diverged = 3
    non_finite = 4

    @staticmethod
    def message(code: int | Array) -> str:
        """One sentence of what happened and what to do about it.

        Args:
            code: an entry of ``Solution.result``.

        Returns:
            The advice for that code.

        Raises:
            ValueError: if ``code`` is not one of the five codes.
        """
        return _MESSAGES[Result(int(code))]


_MESSAGES = {
    Result.converged: "The problem converged to the tolerance asked for.",
    Result.max_steps: (
        "The step limit came before the tolerance: raise max_steps, loosen rtol or atol, or take a "
        "solver that needs fewer steps (Anderson instead of Picard)."
    ),
    Result.stagnated: (
        "The residual stopped falling above the tolerance: it is at the rounding floor of this "
        "dtype or cycles; loosen rtol, compute in float64 or at a higher matmul precision, or damp "
        "the iteration."
    ),
    Result.diverged: (
        "The iteration moved away without bound and the last good iterate was kept: damp it, take "
        "a smaller step on x, or make the cell contractive (Jacobian penalty, weight norm)."
    ),
    Result.non_finite: (
        "An evaluation gave NaN or infinity and the last good iterate was kept: look for bad "
        "values in this problem's x, target or data, and for overflow in the cell."
    ),
}


class History(NamedTuple):
    """The trace of a solve, kept on request.

    Attributes:
        residual: the residuals (same structure as ``Solution.residual``), each ``[T, B]`` with
            ``T = max_steps``; NaN in rows that were not run.
        merit: what chooses the returned iterate, ``[T, B]``: the residual for a fixed point, the
            objective for an input problem (of ``nested_solve`` corrected for the inexact state);
            NaN in rows that were not run.
        record: what the function given as ``history`` returned at each iterate, stacked
            ``[T, ...]`` and zero in rows that were not run; None for ``history=True``.
    """

    residual: Any
    merit: Array
    record: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """The outcome of a solve of B problems.

    Only ``value`` carries gradients; the other fields are constants to autodiff.

    Attributes:
        value: the solution, every leaf with the problem axis B first.
        result: one ``Result`` code a problem, int32 ``[B]``.
        steps: cell evaluations spent on each problem, int32 ``[B]``.
        residual: the residual of ``value``, ``[B]`` or a named tuple of such; infinity where no
            evaluation of the problem was finite.
        history: a ``History``, or None if it was not asked for.
        aux: further outputs of the solve; which ones, the function that returns it says.
    """

    value: Any
    result: Array
    steps: Array
    residual: Any
    history: History | None = None
    aux: Any = None

    @property
    def converged(self) -> Array:
        """Whether each problem met its tolerance, bool ``[B]``."""
        return self.result == Result.converged


def places(first: Any, second: Any) -> Solution:
    """How a solution lies on a mesh, by ``PartitionSpec``; see ``jdeq._shards.automatic``."""
    return Solution(first, first, first, first, history=second, aux=first)


def constant_but_value(solution: Solution) -> Solution:
    """Makes everything but ``value`` a constant to autodiff."""
    constant = jax.lax.stop_gradient(dataclasses.replace(solution, value=None))
    return dataclasses.replace(constant, value=solution.value)
