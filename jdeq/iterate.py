"""The one loop behind every solve.

It owns what all iterations share: counting, the step limit and the run-time budget, stopping each
problem on its own, the non-finite and divergence guards, the best iterate, and the history. What
is iterated, and how the next iterate is made, is the method's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _tree
from jdeq.solution import History, Result, Solution

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
    """

    residual: PyTree
    converged: Array
    merit: Array
    guard: Array | None
    size: Array
    evaluations: Array | None = None
    refined: PyTree | None = None


Step = Callable[[PyTree, PyTree, Array], tuple[PyTree, PyTree, Report]]
"""``step(iterate, memory, k) -> (next_iterate, next_memory, report_on_iterate)``."""

Prepare = Callable[[PyTree], Step]
"""``prepare(context) -> step`` for the problems that ``context`` belongs to."""


class Fold(NamedTuple):
    """A running value over the iterates of each problem.

    Attributes:
        update: ``update(value, iterate, k) -> value``.
        start: first value, every leaf ``[B, ...]``.
    """

    update: Callable[[PyTree, PyTree, Array], PyTree]
    start: PyTree


class Final(NamedTuple):
    """What is left of the loop besides its solution.

    Attributes:
        merit: of the chosen iterate, ``[B]``; infinity where no evaluation was finite.
        memory: the method's memory after the last step of each problem, or None unless kept.
        folded: last value of the fold, or None.
    """

    merit: Array
    memory: PyTree
    folded: PyTree


class _Carry(NamedTuple):
    k: Array
    iterate: PyTree
    memory: PyTree
    code: Array  # Result.max_steps doubles as "still running"
    steps: Array
    best: PyTree
    best_residual: PyTree
    best_step: Array  # at which the best iterate was seen
    best_merit: Array
    best_guard: Array  # guard of the best iterate
    lowest_guard: Array  # lowest guard of any iterate
    usual_size: Array
    usual_merit: Array
    reference_merit: Array  # merit at the last improvement that counted
    idle_steps: Array  # steps since then
    folded: PyTree
    column: Array | None  # of each problem in the history, once finished ones are left out
    history: History | None


def iterate(
    prepare: Prepare,
    context: PyTree,
    start: PyTree,
    memory: PyTree,
    *,
    max_steps: int,
    budget: Array | None = None,
    record: bool | Callable[[PyTree], PyTree] = False,
    fold: Fold | None = None,
    patience: int | None = STAGNATION_STEPS,
    measure_best_last: bool = False,
    keep_memory: bool = False,
    compaction: int = 0,
) -> tuple[Solution, Final]:
    """Iterates until every problem has finished or the step limit is reached.

    A finished problem's iterate is frozen, so that its numbers do not change while others go on.
    The returned iterate is always one whose report was taken: the first that converged, else the
    one of lowest merit among those that pass the guard.

    With ``compaction`` the loop stops once at most three quarters of the problems go on, gathers
    those and continues with them alone, and so on with a half, three eighths, a quarter: what a
    finished problem costs is bounded, at the price of one more compiled loop a size.

    Args:
        prepare: ``prepare(context)`` is a function ``step(iterate, memory, k) -> (next_iterate,
            memory, report)``, the report being about ``iterate``. What it computes before it
            returns is computed once a loop.
        context: what the step needs to know of each problem, every leaf ``[B, ...]``.
        start: first iterate, every leaf ``[B, ...]``.
        memory: the method's memory at the start, every leaf ``[B, ...]``.
        max_steps: static limit on the number of steps, at least 1.
        budget: further limit known at run time only, int scalar.
        record: whether to keep the history; a function of the iterate is recorded besides, if
            there is no compaction.
        fold: a running value over each problem's iterates.
        patience: steps after which a problem is stopped whose merit no longer improves, or None
            for no such stop.
        measure_best_last: whether the last step of the limit is spent on the best iterate, whose
            report then replaces the one that it was chosen by. For steps whose reports are exact
            only on demand.
        keep_memory: whether the final memory is wanted: a problem that has finished, or whose
            evaluation was not finite, then keeps what it has.
        compaction: number of smaller batch sizes, at least 0.

    Returns:
        The ``Solution`` whose value is the chosen iterate, and what else is left at the end.
    """
    limit = step_limit(max_steps, budget)
    report_shape = jax.eval_shape(
        lambda c, s, m: prepare(c)(s, m, jnp.zeros((), jnp.int32))[2], context, start, memory
    )
    carry = _start(start, memory, report_shape, max_steps, record, fold, compaction)

    def loop(context: PyTree, carry: _Carry, least: int) -> _Carry:
        step = prepare(context)

        def running(carry: _Carry) -> Array:
            going = jnp.count_nonzero(carry.code == Result.max_steps)
            return (carry.k < limit) & (going > least)

        def body(carry: _Carry) -> _Carry:
            last = (carry.k == limit - 1) & measure_best_last
            if measure_best_last:
                at_last = last & (carry.code == Result.max_steps)
                carry = carry._replace(iterate=_tree.select(at_last, carry.best, carry.iterate))
            new_iterate, new_memory, report = step(carry.iterate, carry.memory, carry.k)
            return _advance(
                carry,
                new_iterate,
                new_memory,
                report,
                record,
                fold,
                patience,
                last,
                keep_memory,
            )

        return lax.while_loop(running, body, carry)

    carry = _compact(loop, context, carry, _smaller_sizes(carry.code.shape[0], compaction))
    solution = Solution(
        value=carry.best,
        result=carry.code,
        steps=carry.steps,
        residual=carry.best_residual,
        history=carry.history,
    )
    return solution, Final(carry.best_merit, carry.memory if keep_memory else None, carry.folded)


def _compact(
    loop: Callable[[PyTree, _Carry, int], _Carry],
    context: PyTree,
    carry: _Carry,
    sizes: tuple[int, ...],
) -> _Carry:
    """Runs the loop on all problems, then on the unfinished ones among fewer, and so on."""
    if not sizes:
        return loop(context, carry, 0)
    size, *smaller = sizes
    carry = loop(context, carry, size)
    # No more than these are unfinished; finished ones fill up the rest and stand still.
    chosen = jnp.argsort(carry.code != Result.max_steps)[:size]
    own = carry._asdict()
    k, history = own.pop("k"), own.pop("history")

    def take(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[chosen], tree)

    start = _Carry(k=k, history=history, **take(own))
    part = _compact(loop, take(context), start, tuple(smaller))._asdict()
    k, history = part.pop("k"), part.pop("history")
    own = jax.tree.map(lambda leaf, new: leaf.at[chosen].set(new), own, part)
    return _Carry(k=k, history=history, **own)


def _smaller_sizes(count: int, compaction: int) -> tuple[int, ...]:
    """Three quarters, a half, three eighths, a quarter, ... of ``count``, at least one."""
    shares = [(0.5 if i % 2 else 0.75) / 2 ** (i // 2) for i in range(compaction)]
    sizes = {max(1, int(count * share)) for share in shares}
    return tuple(sorted(sizes - {count}, reverse=True))


def step_limit(max_steps: int, budget: Array | None) -> Array:
    """The smaller of the static limit on steps and the run-time budget, if any: int32 scalar."""
    limit = jnp.asarray(max_steps, jnp.int32)
    return limit if budget is None else jnp.minimum(limit, jnp.asarray(budget, jnp.int32))


def _start(
    start: PyTree,
    memory: PyTree,
    report: Report,
    max_steps: int,
    record: bool | Callable,
    fold: Fold | None,
    compaction: int,
) -> _Carry:
    count = _tree.problem_count(start)
    infinite = jnp.full((count,), jnp.inf, report.merit.dtype)
    zeros = jnp.zeros((count,), jnp.int32)
    guard = report.guard if report.guard is not None else report.merit
    return _Carry(
        k=jnp.zeros((), jnp.int32),
        iterate=start,
        memory=memory,
        code=jnp.full((count,), Result.max_steps, jnp.int32),
        steps=zeros,
        best=start,
        best_residual=jax.tree.map(lambda r: jnp.full(r.shape, jnp.inf, r.dtype), report.residual),
        best_merit=infinite,
        best_step=zeros - 1,
        best_guard=jnp.full((count,), jnp.inf, guard.dtype),
        lowest_guard=jnp.full((count,), jnp.inf, guard.dtype),
        usual_size=jnp.ones((count,), report.size.dtype),
        usual_merit=jnp.zeros((count,), report.merit.dtype),
        reference_merit=infinite,
        idle_steps=zeros,
        folded=None if fold is None else fold.start,
        column=jnp.arange(count) if compaction and record is not False else None,
        history=_empty_history(start, report, max_steps, record),
    )


def _advance(
    carry: _Carry,
    new_iterate: PyTree,
    new_memory: PyTree,
    report: Report,
    record: bool | Callable,
    fold: Fold | None,
    patience: int | None,
    replace_best: Array,
    keep_memory: bool,
) -> _Carry:
    active = carry.code == Result.max_steps
    finite = _all_finite(report)
    usual_size, usual_merit = (
        jnp.where(carry.k < USUAL_SIZE_STEPS, jnp.maximum(new, usual), usual)
        for new, usual in (
            (report.size, carry.usual_size),
            (jnp.abs(report.merit), carry.usual_merit),
        )
    )
    idle_steps, reference_merit = _count_idle(carry, report)
    stagnated = jnp.zeros_like(active) if patience is None else idle_steps >= patience
    # Slow convergence far from the start ends at the rounding floor, large but not running away.
    lost = stagnated & ~(carry.best_merit < STAGNATION_PROGRESS * usual_merit)
    growth = jnp.where(lost, STAGNATION_GROWTH, DIVERGENCE_FACTOR).astype(usual_size.dtype)
    diverged = (report.size > growth * usual_size) & ~report.converged
    eligible = active & finite & ~diverged
    lowest_guard, accept = _choose(carry, report, eligible)
    accept |= eligible & replace_best

    code = jnp.where(stagnated, jnp.int32(Result.stagnated), carry.code)
    code = jnp.where(diverged, jnp.int32(Result.diverged), code)
    code = jnp.where(finite, code, jnp.int32(Result.non_finite))
    code = jnp.where(finite & report.converged, jnp.int32(Result.converged), code)
    code = jnp.where(active, code, carry.code)

    spent = 1 if report.evaluations is None else report.evaluations
    # Masks taken from what is carried are not computed anew for every entry that they select, which
    # XLA's fusion otherwise does, barrier or not.
    best_step = jnp.where(accept, carry.k, carry.best_step)
    accept, keep_going = best_step == carry.k, code == Result.max_steps
    current = carry.iterate if report.refined is None else report.refined
    history = _write_history(carry, current, report, active, record)
    folded = carry.folded
    if fold is not None:
        folded = _tree.select(active & finite, fold.update(folded, current, carry.k), folded)
    if keep_memory:
        new_memory = _tree.select(active & finite, new_memory, carry.memory)
    guard = report.merit if report.guard is None else report.guard
    return _Carry(
        k=carry.k + 1,
        iterate=_tree.select(keep_going, new_iterate, carry.iterate),
        memory=new_memory,
        code=code,
        steps=carry.steps + jnp.where(active, spent, 0).astype(jnp.int32),
        best=_tree.select(accept, current, carry.best),
        best_residual=_tree.select(accept, report.residual, carry.best_residual),
        best_merit=jnp.where(accept, report.merit, carry.best_merit),
        best_step=best_step,
        best_guard=jnp.where(accept, guard, carry.best_guard),
        lowest_guard=lowest_guard,
        usual_size=usual_size,
        usual_merit=usual_merit,
        reference_merit=reference_merit,
        idle_steps=idle_steps,
        folded=folded,
        column=carry.column,
        history=history,
    )


def _all_finite(report: Report) -> Array:
    leaves = [*jax.tree.leaves(report.residual), report.merit, report.size]
    finite = jnp.isfinite(leaves[0])
    for leaf in leaves[1:]:
        finite &= jnp.isfinite(leaf)
    return finite


def _choose(carry: _Carry, report: Report, eligible: Array) -> tuple[Array, Array]:
    """The lowest guard so far, and whether the current iterate becomes the best one."""
    better = report.merit < carry.best_merit
    if report.guard is None:
        return carry.lowest_guard, eligible & (better | report.converged)
    # The first iterates set no standard: their state is often at equilibrium exactly (zero, or a
    # warm start) because the input has not moved yet, and none that moves could ever compete.
    early = carry.k < GUARD_BURN_IN
    standard = jnp.where(early, jnp.inf, jnp.minimum(carry.lowest_guard, report.guard))
    lowest = jnp.where(eligible, standard, carry.lowest_guard)
    passes = report.guard <= GUARD_SLACK * lowest
    outdated = (carry.best_guard > GUARD_SLACK * lowest) | early
    return lowest, eligible & (report.converged | (passes & (better | outdated)))


def _count_idle(carry: _Carry, report: Report) -> tuple[Array, Array]:
    reference = carry.reference_merit
    improved = report.merit < reference - STAGNATION_GAIN * jnp.abs(reference)
    improved |= ~jnp.isfinite(carry.reference_merit)
    idle_steps = jnp.where(improved, 0, carry.idle_steps + 1)
    return idle_steps, jnp.where(improved, report.merit, carry.reference_merit)


def _empty_history(
    start: PyTree, report: Report, max_steps: int, record: bool | Callable
) -> History | None:
    if record is False:
        return None

    def rows(leaf: Any) -> Array:
        return jnp.full((max_steps, *leaf.shape), jnp.nan, leaf.dtype)

    recorded = None
    if callable(record):
        shapes = jax.eval_shape(record, start)
        recorded = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), shapes)
    return History(jax.tree.map(rows, report.residual), rows(report.merit), recorded)


def _write_history(
    carry: _Carry, current: PyTree, report: Report, active: Array, record: bool | Callable
) -> History | None:
    if carry.history is None:
        return None

    def write(rows: Array, row: Array) -> Array:
        if carry.column is not None:
            return rows.at[carry.k, carry.column].set(row.astype(rows.dtype))
        return lax.dynamic_update_index_in_dim(rows, row.astype(rows.dtype), carry.k, 0)

    def write_active(rows: Array, row: Array) -> Array:
        return write(rows, jnp.where(active, row, jnp.nan))

    recorded = carry.history.record
    if callable(record):
        recorded = jax.tree.map(write, recorded, record(current))
    residual = jax.tree.map(write_active, carry.history.residual, report.residual)
    return History(residual, write_active(carry.history.merit, report.merit), recorded)
