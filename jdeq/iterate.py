"""The one loop behind every solve.

It owns what all iterations share: counting, the step limit and the run-time budget, stopping each
problem on its own, the best iterate, and the history. What is iterated, and how the next iterate is
made, is the method's; when a problem has finished, and which of its iterates is the best, is up to
``jdeq._standing``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _history, _tree
from jdeq._history import Record
from jdeq._shards import vary_alike
from jdeq._standing import STAGNATION_STEPS, Report, Standing, judge
from jdeq.solution import History, Result, Solution

PyTree = Any

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
    standing: Standing
    folded: PyTree
    column: Array | None  # of each problem in the history, once finished ones are left out
    history: History | None


def iterate(
    prepare: Prepare,
    context: PyTree,
    start: PyTree,
    memory: PyTree,
    *,
    report: Report,
    max_steps: int,
    budget: Array | None = None,
    record: Record = False,
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
        report: shapes and dtypes of what a step reports; tracing one for them takes long.
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
    context, start, memory = vary_alike((context, start, memory))
    carry = _start(start, memory, report, max_steps, record, fold, compaction)

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
    return solution, Final(
        carry.standing.best_merit, carry.memory if keep_memory else None, carry.folded
    )


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
    record: Record,
    fold: Fold | None,
    compaction: int,
) -> _Carry:
    count = _tree.problem_count(start)
    zeros = jnp.zeros((count,), jnp.int32)
    first = _Carry(
        k=jnp.zeros((), jnp.int32),
        iterate=start,
        memory=memory,
        code=jnp.full((count,), Result.max_steps, jnp.int32),
        steps=zeros,
        best=start,
        best_residual=jax.tree.map(lambda r: jnp.full(r.shape, jnp.inf, r.dtype), report.residual),
        best_step=zeros - 1,
        standing=Standing.first(report),
        folded=None if fold is None else fold.start,
        column=jnp.arange(count) if compaction and record is not False else None,
        history=_history.empty(start, report, max_steps, record),
    )
    return vary_alike(first)


def _advance(
    carry: _Carry,
    new_iterate: PyTree,
    new_memory: PyTree,
    report: Report,
    record: Record,
    fold: Fold | None,
    patience: int | None,
    replace_best: Array,
    keep_memory: bool,
) -> _Carry:
    active = carry.code == Result.max_steps
    verdict, standing = judge(carry.standing, report, carry.k, active, patience, replace_best)
    code = jnp.where(active, verdict.code, carry.code)
    spent = 1 if report.evaluations is None else report.evaluations
    # Masks taken from what is carried are not computed anew for every entry that they select, which
    # XLA's fusion otherwise does, barrier or not.
    best_step = jnp.where(verdict.better, carry.k, carry.best_step)
    better, keep_going = best_step == carry.k, code == Result.max_steps
    current = carry.iterate if report.refined is None else report.refined
    folded = carry.folded
    if fold is not None:
        updated = fold.update(folded, current, carry.k)
        folded = _tree.select(active & verdict.finite, updated, folded)
    if keep_memory:
        new_memory = _tree.select(active & verdict.finite, new_memory, carry.memory)
    return _Carry(
        k=carry.k + 1,
        iterate=_tree.select(keep_going, new_iterate, carry.iterate),
        memory=new_memory,
        code=code,
        steps=carry.steps + jnp.where(active, spent, 0).astype(jnp.int32),
        best=_tree.select(better, current, carry.best),
        best_residual=_tree.select(better, report.residual, carry.best_residual),
        best_step=best_step,
        standing=standing,
        folded=folded,
        column=carry.column,
        history=_history.write(
            carry.history, carry.k, carry.column, current, report, active, record
        ),
    )
