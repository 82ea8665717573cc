"""Fixed-point correction: losses on a few iterates of a solve, besides the one at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree
from jdeq.adjoints.phantom import JacobianFree, Phantom
from jdeq.fixed_point import deq
from jdeq.iterate import Fold
from jdeq.solution import Result
from jdeq.solvers.base import Solver

PyTree = Any


def correction_iterates(
    cell: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    z0: PyTree,
    *,
    data: PyTree = None,
    at: Sequence[int],
    solver: Solver | None = None,
    adjoint: JacobianFree | Phantom | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> tuple[PyTree, ...]:
    """Iterates of the solve of ``jdeq.deq``, differentiable as if each were its equilibrium.

    Losses on them (Bai et al. 2022, "Deep equilibrium optical flow estimation") pull the early
    iterates towards the answer: training is steadier and fewer steps are needed. The
    equilibrium itself is then best solved from the last of them, which wastes no step:

        early = correction_iterates(cell, params, x, z0, at=(4, 8))
        final = jdeq.deq(cell, params, x, early[-1]).value
        total = loss(final) + correction_loss(loss, early)

    A problem that converges before keeps its equilibrium; one that fails before keeps the best
    iterate so far, and one that is not even finite there contributes no gradient. The start has a
    zero gradient. The solve keeps ``len(at)`` states besides its own, and one evaluation of
    ``len(at)`` times the batch, with its derivative, gives the gradient.

    Args:
        cell: as in ``jdeq.deq``.
        params: as in ``jdeq.deq``.
        x: as in ``jdeq.deq``.
        z0: as in ``jdeq.deq``.
        data: as in ``jdeq.deq``.
        at: steps after which an iterate is taken, each at least 0 (0 is ``z0`` itself).
        solver: as in ``jdeq.deq``.
        adjoint: how each iterate is differentiated: ``JacobianFree()``, the default, or
            ``Phantom()``, which looks further; the others assume an equilibrium.
        rtol: as in ``jdeq.deq``: where the solve ends before the last step.
        atol: likewise.

    Returns:
        One state an entry of ``at``, each like ``z0``.

    Raises:
        TypeError: as ``jdeq.deq``, or if ``adjoint`` is of another kind.
        ValueError: as ``jdeq.deq``, or if ``at`` is empty or has an entry below 0.
    """
    owner = "correction_iterates"
    if not isinstance(at, Sequence) or not at:
        raise ValueError(
            f"{owner}: at={at!r} was given, but a sequence of at least one step is expected, such "
            f"as (4, 8)."
        )
    for step in at:
        _options.check_count(owner, "an entry of at", step, least=0)
    adjoint = JacobianFree() if adjoint is None else adjoint
    if not isinstance(adjoint, JacobianFree | Phantom):
        raise TypeError(
            f"{owner}: adjoint={adjoint!r} was given, but jdeq.adjoints.JacobianFree() or "
            f"jdeq.adjoints.Phantom() is expected, since other gradients assume an equilibrium."
        )
    count = _options.problem_count(owner, "z0", z0)
    _options.check_batch(owner, "z0", count, x=x, data=data)

    solution = deq(
        cell,
        params,
        x,
        z0,
        data=data,
        solver=solver,
        adjoint=JacobianFree(),
        rtol=rtol,
        atol=atol,
        max_steps=max(at) + 1,
        fold=Fold(_Keep(tuple(at)), ((z0,) * len(at), jnp.zeros(count, jnp.int32))),
    )
    kept, last = solution.aux.folded
    # Where the solver threw its last iterate far away.
    ended = (solution.result == Result.diverged) | (solution.result == Result.stagnated)
    value = jax.lax.stop_gradient(solution.value)
    taken = [
        _tree.select(ended & (step >= last), value, z) for step, z in zip(at, kept, strict=True)
    ]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *taken)
    repeated = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(at)), (x, data))
    # A solve of one step returns its start, with the gradient of a solution.
    differentiable = deq(
        cell,
        params,
        repeated[0],
        together,
        data=repeated[1],
        solver=solver,
        adjoint=adjoint,
        rtol=rtol,
        atol=atol,
        max_steps=1,
    ).value
    return tuple(
        jax.tree.map(lambda leaf, i=i: leaf[i * count : (i + 1) * count], differentiable)
        for i in range(len(at))
    )


def correction_loss(
    loss: Callable[[PyTree], Array], iterates: Sequence[PyTree], *, discount: float = 0.8
) -> Array:
    """``sum_i discount^(n - i) loss(z_i)`` over iterates ``z_0, ..., z_{n-1}``.

    To be added to the loss at the equilibrium, whose weight is one.

    Args:
        loss: a function of the state, of any one shape, such as ``[B]``.
        iterates: from early to late, see ``correction_iterates``.
        discount: ratio of the weights of an iterate and the next, in (0, 1].

    Returns:
        The weighted sum, of the shape of ``loss``.

    Raises:
        ValueError: if ``discount`` is out of range or there are no iterates.
    """
    _options.check_fraction("correction_loss", "discount", discount)
    if not iterates:
        raise ValueError(
            "correction_loss: no iterates were given, but at least one is expected; see "
            "correction_iterates."
        )
    n = len(iterates)
    terms = [discount ** (n - i) * loss(z) for i, z in enumerate(iterates)]
    return sum(terms[1:], terms[0])


@dataclasses.dataclass(frozen=True)
class _Keep:
    """A fold that keeps the iterates of some steps, or the last one before, and its step."""

    at: tuple[int, ...]

    def __call__(self, folded: tuple[tuple, Array], z: PyTree, k: Array) -> tuple[tuple, Array]:
        kept, last = folded
        kept = tuple(
            jax.tree.map(lambda new, old, step=step: jnp.where(k <= step, new, old), z, held)
            for step, held in zip(self.at, kept, strict=True)
        )
        return kept, jnp.full_like(last, k)
