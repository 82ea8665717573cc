"""What is thought of each problem of a solve: whether it has finished, and its best iterate.

A solve's loop (``jdeq.iterate``) asks here after every step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq.solution import Result

PyTree = Any

DIVERGENCE_FACTOR = 1e6
"""A problem has diverged once its size exceeds this times its usual one, which is the largest of
its first few, and at least one: a start at zero must not make everything after it look large."""

USUAL_SIZE_STEPS = 3
"""Steps after which each block of an iterate has moved, since an input reaches the state after one
and the adjoint after two."""

STAGNATION_STEPS = 40
"""A problem has stagnated after this many steps without an improvement of its merit..."""

STAGNATION_GAIN = 1e-3
"""...by at least this fraction..."""

STAGNATION_GROWTH = 10
"""...unless its size exceeds this times its usual one..."""

STAGNATION_PROGRESS = 0.1
"""...and its merit never fell below this times its usual one: then it has diverged, if slowly."""

GUARD_SLACK = 1.3
"""An iterate may be returned only if its guard is within this factor of the best guard seen."""

GUARD_BURN_IN = 10
"""In the first steps the newest iterate is taken whatever its guard (Gurumurthy et al. 2021)."""


class Report(NamedTuple):
    """What one evaluation says of the current iterate, per problem.

    Attributes:
        residual: residuals to record and return, a pytree of ``[B]``.
        converged: whether the iterate meets the tolerance, bool ``[B]``.
        merit: the lower, the better the iterate, ``[B]``.
        guard: a condition on the choice by ``merit``: only iterates whose guard is within
            ``GUARD_SLACK`` of the lowest guard seen since step ``GUARD_BURN_IN`` compete; ``[B]``,
            or None for no condition.
        size: what grows when the iteration runs away, ``[B]``.
        evaluations: cell evaluations this step spent, int ``[B]``, or None for one.
        refined: the iterate that the report is about, where the step improved on the given one
            before measuring; None is the given one.
        settled: whether half the digits of the iterate are found, bool ``[B]``; None where no
            residual says so.
    """

    residual: PyTree
    converged: Array
    merit: Array
    guard: Array | None
    size: Array
    evaluations: Array | None = None
    refined: PyTree | None = None
    settled: Array | None = None


class Standing(NamedTuple):
    """What the next verdict on a problem needs to know of its past, every leaf ``[B]``.

    Attributes:
        best_merit: merit of the best iterate.
        best_guard: its guard, or None where reports have none.
        lowest_guard: lowest guard of any iterate, or None.
        best_settled: whether the best iterate is settled, or None where reports do not say.
        usual_size: largest size of the first few iterates, at least one.
        usual_merit: largest absolute merit of the first few.
        reference_merit: merit at the last improvement that counted.
        idle_steps: steps since then, int32.
    """

    best_merit: Array
    best_guard: Array | None
    lowest_guard: Array | None
    best_settled: Array | None
    usual_size: Array
    usual_merit: Array
    reference_merit: Array
    idle_steps: Array

    @classmethod
    def first(cls, report: Report) -> Standing:
        """Before any report; ``report`` has the shapes and dtypes of those to come."""
        merit, guard = report.merit, report.guard
        infinite = jnp.full(merit.shape, jnp.inf, merit.dtype)
        no_guard = None if guard is None else jnp.full(guard.shape, jnp.inf, guard.dtype)
        return cls(
            best_merit=infinite,
            best_guard=no_guard,
            lowest_guard=no_guard,
            best_settled=None if report.settled is None else jnp.zeros(merit.shape, bool),
            usual_size=jnp.ones(report.size.shape, report.size.dtype),
            usual_merit=jnp.zeros(merit.shape, merit.dtype),
            reference_merit=infinite,
            idle_steps=jnp.zeros(merit.shape, jnp.int32),
        )


class Verdict(NamedTuple):
    """What one report means, every leaf ``[B]``.

    Attributes:
        code: a ``Result``, as if the problem still went on; ``max_steps`` for one that does.
        finite: whether the report is, bool.
        better: whether the iterate becomes the best one, bool.
    """

    code: Array
    finite: Array
    better: Array


def judge(
    standing: Standing,
    report: Report,
    k: Array,
    active: Array,
    patience: int | None,
    replace_best: Array,
) -> tuple[Verdict, Standing]:
    """The verdict on the iterates of step ``k``.

    Args:
        standing: what is known so far.
        report: on the iterates of this step.
        k: the step, int32 scalar.
        active: problems that go on, bool ``[B]``; no iterate of others becomes the best.
        patience: steps without improvement after which a problem has stagnated, or None.
        replace_best: whether a finite iterate becomes the best whatever its merit, bool.

    Returns:
        The verdict, and the standing that the next one needs.
    """
    finite = _all_finite(report)
    usual_size, usual_merit = (
        jnp.where(k < USUAL_SIZE_STEPS, jnp.maximum(new, usual), usual)
        for new, usual in (
            (report.size, standing.usual_size),
            (jnp.abs(report.merit), standing.usual_merit),
        )
    )
    idle_steps, reference_merit = _count_idle(standing, report)
    stagnated = jnp.zeros_like(active) if patience is None else idle_steps >= patience
    # Slow convergence far from the start ends at the rounding floor, large but not running away.
    lost = stagnated & ~(standing.best_merit < STAGNATION_PROGRESS * usual_merit)
    growth = jnp.where(lost, STAGNATION_GROWTH, DIVERGENCE_FACTOR).astype(usual_size.dtype)
    diverged = (report.size > growth * usual_size) & ~report.converged
    eligible = active & finite & ~diverged
    lowest_guard, better = _choose(standing, report, k, eligible)
    better |= eligible & replace_best

    code = jnp.where(stagnated, jnp.int32(Result.stagnated), jnp.int32(Result.max_steps))
    code = jnp.where(diverged, jnp.int32(Result.diverged), code)
    code = jnp.where(finite, code, jnp.int32(Result.non_finite))
    best_settled = standing.best_settled
    if best_settled is not None and report.settled is not None:
        # What runs away from a solution was thrown by rounding, as by secants between equal
        # iterates: no divergence takes back the digits that the best iterate has.
        thrown = (diverged | ~finite) & best_settled
        code = jnp.where(thrown, jnp.int32(Result.stagnated), code)
        best_settled = jnp.where(better, report.settled, best_settled)
    code = jnp.where(finite & report.converged, jnp.int32(Result.converged), code)
    best_guard = standing.best_guard
    if best_guard is not None and report.guard is not None:
        best_guard = jnp.where(better, report.guard, best_guard)
    return Verdict(code, finite, better), Standing(
        best_merit=jnp.where(better, report.merit, standing.best_merit),
        best_guard=best_guard,
        lowest_guard=lowest_guard,
        best_settled=best_settled,
        usual_size=usual_size,
        usual_merit=usual_merit,
        reference_merit=reference_merit,
        idle_steps=idle_steps,
    )


def _all_finite(report: Report) -> Array:
    leaves = [*jax.tree.leaves(report.residual), report.merit, report.size]
    finite = jnp.isfinite(leaves[0])
    for leaf in leaves[1:]:
        finite &= jnp.isfinite(leaf)
    return finite


def _choose(
    standing: Standing, report: Report, k: Array, eligible: Array
) -> tuple[Array | None, Array]:
    """The lowest guard so far, and whether the current iterate becomes the best one."""
    better = report.merit < standing.best_merit
    if report.guard is None or standing.lowest_guard is None or standing.best_guard is None:
        return None, eligible & (better | report.converged)
    # The first iterates set no standard: their state is often at equilibrium exactly (zero, or a
    # warm start) because the input has not moved yet, and none that moves could ever compete.
    early = k < GUARD_BURN_IN
    standard = jnp.where(early, jnp.inf, jnp.minimum(standing.lowest_guard, report.guard))
    lowest = jnp.where(eligible, standard, standing.lowest_guard)
    passes = report.guard <= GUARD_SLACK * lowest
    outdated = (standing.best_guard > GUARD_SLACK * lowest) | early
    return lowest, eligible & (report.converged | (passes & (better | outdated)))


def _count_idle(standing: Standing, report: Report) -> tuple[Array, Array]:
    reference = standing.reference_merit
    improved = report.merit < reference - STAGNATION_GAIN * jnp.abs(reference)
    improved |= ~jnp.isfinite(reference)
    idle_steps = jnp.where(improved, 0, standing.idle_steps + 1)
    return idle_steps, jnp.where(improved, report.merit, reference)
