"""The augmented state ``(z, x, mu)``, one evaluation of its map, and its residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _tree
from jdeq._standing import GUARD_SLACK, Report
from jdeq.equilibrium import Controls, within_tolerance
from jdeq.joint.problem import PureProblem, Theta

PyTree = Any

_LONGEST_STEP = 1e6
"""Cap on the relative length of the step that measures stationarity."""


class AugmentedState(NamedTuple):
    """What the joint solve iterates; every leaf has the problem axis first.

    Attributes:
        z: the equilibrium state.
        x: the optimised input.
        mu: the adjoint (costate, Lagrange multiplier) of ``z = f(z, x)``, like ``z``.
    """

    z: PyTree
    x: PyTree
    mu: PyTree


class KKTResidual(NamedTuple):
    """Residuals of the first-order conditions, one entry a problem each, ``[B]``.

    Attributes:
        state: ``||f(z, x) - z||``.
        adjoint: ``||(df/dz)^T mu + dl/dz - mu||``.
        stationarity: ``||x - P(x - s g)|| / (1 + ||x||)`` with ``g = (df/dx)^T mu + dl/dx`` and
            ``s = (1 + ||x||)^2 / (|l_start| + |l|)``; without a constraint that is
            ``||g|| (1 + ||x||) / (|l_start| + |l|)``. It does not change with the units of ``l``.
    """

    state: Array
    adjoint: Array
    stationarity: Array


class Evaluation(NamedTuple):
    """One evaluation of the augmented map.

    Attributes:
        state: ``f(z, x)``.
        pulled: ``(df/dz)^T mu``, like z.
        slope: ``dl/dz``, like z.
        gradient: ``(df/dx)^T mu + dl/dx``, like x.
        objective: ``l``, ``[B]``.
    """

    state: PyTree
    pulled: PyTree
    slope: PyTree
    gradient: PyTree
    objective: Array

    @property
    def adjoint(self) -> PyTree:
        """``(df/dz)^T mu + dl/dz``, like z."""
        return _tree.add(self.pulled, self.slope)


def shapes(at: AugmentedState, objective: Array) -> Evaluation:
    """Arrays of the shapes and dtypes of an evaluation at ``at``, in its places."""
    return Evaluation(at.z, at.z, at.z, at.x, objective)


def evaluate(
    pure: PureProblem, theta: Theta, target: PyTree, rest: tuple, at: AugmentedState
) -> Evaluation:
    """One evaluation of ``f``, one vector-Jacobian product of it, and one gradient of ``l``."""
    _, evaluation = _evaluate(pure, theta, target, rest, at, lambda fz: at.z, lambda slope: at.mu)
    return evaluation


def evaluate_ahead(
    pure: PureProblem,
    theta: Theta,
    target: PyTree,
    rest: tuple,
    at: AugmentedState,
    ahead: Callable[[PyTree, PyTree], PyTree],
    exact: Array,
    complete: Array,
) -> tuple[AugmentedState, Evaluation]:
    """The same work in an order that lets the gradient lag behind x as little as possible.

    The objective is taken where the state goes next, and its slope is in the adjoint before that
    is pulled back. In ``evaluate`` a new x reaches the state after one iteration, the adjoint after
    two and the gradient after three; here all of them at once, but for what the cell feeds back.

    Args:
        pure: the problem.
        theta: what all problems share.
        target: one entry a problem.
        rest: ``()`` or ``(data,)``.
        at: the iterate; its ``mu`` lacks ``dl/dz``, it is ``(df/dz)^T mu`` of the last iteration.
        ahead: ``ahead(z, fz)`` is where the state goes next.
        exact: where the objective is to be taken at ``z`` after all, bool ``[B]``: then the
            evaluation is that of ``evaluate`` at the returned iterate.
        complete: where ``at.mu`` is the whole adjoint, bool ``[B]``.

    Returns:
        The iterate with its whole adjoint, and its evaluation. Unless exact, ``slope``,
        ``objective`` and ``dl/dx`` are those of the state ahead.
    """
    return _evaluate(
        pure,
        theta,
        target,
        rest,
        at,
        lambda fz: _tree.select(exact, at.z, ahead(at.z, fz)),
        lambda slope: _tree.select(complete, at.mu, _tree.add(at.mu, slope)),
    )


def _evaluate(
    pure: PureProblem,
    theta: Theta,
    target: PyTree,
    rest: tuple,
    at: AugmentedState,
    state_of_objective: Callable[[PyTree], PyTree],
    whole_adjoint: Callable[[PyTree], PyTree],
) -> tuple[AugmentedState, Evaluation]:
    fz, pull_back = jax.vjp(lambda z, x: pure.cell(theta, (x, *rest), z), at.z, at.x)
    objective, pull_back_loss = jax.vjp(
        lambda z, x: pure.objective(theta, z, x, target, rest), state_of_objective(fz), at.x
    )
    slope, loss_x = pull_back_loss(jnp.ones_like(objective))
    at = at._replace(mu=whole_adjoint(slope))
    pulled, cell_x = pull_back(at.mu)
    return at, Evaluation(fz, pulled, slope, _tree.add(cell_x, loss_x), objective)


def report(
    pure: PureProblem,
    theta: Theta,
    rest: tuple,
    at: AugmentedState,
    evaluation: Evaluation,
    first_objective: Array,
    controls: Controls,
) -> Report:
    """What an evaluation says of ``at``: of its iterates near equilibrium, the lowest objective."""
    residual = kkt_residual(pure, theta, rest, at, evaluation, first_objective)
    return Report(
        residual=residual,
        converged=meets_tolerance(residual, evaluation, controls),
        merit=evaluation.objective,
        guard=guard(residual, evaluation, controls),
        size=size(residual, evaluation),
    )


def kkt_residual(
    pure: PureProblem,
    theta: Theta,
    rest: tuple,
    at: AugmentedState,
    evaluation: Evaluation,
    first_objective: Array,
) -> KKTResidual:
    """The residuals at ``at``, given the evaluation there and the objective at the start."""
    return KKTResidual(
        state=_tree.norm(_tree.subtract(evaluation.state, at.z)),
        adjoint=_tree.norm(_tree.subtract(evaluation.adjoint, at.mu)),
        stationarity=_stationarity(pure, theta, rest, at.x, evaluation, first_objective),
    )


def _stationarity(
    pure: PureProblem,
    theta: Theta,
    rest: tuple,
    x: PyTree,
    evaluation: Evaluation,
    first_objective: Array,
) -> Array:
    length = relative_length(x, evaluation.gradient, evaluation.objective, first_objective)
    if pure.project is None:
        return length
    size, slope = 1 + _tree.norm(x), _tree.norm(evaluation.gradient)
    factor = length * size / jnp.where(slope > 0, slope, 1)
    moved = _tree.subtract(x, _tree.scale(factor, evaluation.gradient))
    return _tree.norm(_tree.subtract(x, pure.project(theta, moved, rest))) / size


def relative_length(x: PyTree, gradient: PyTree, objective: Array, first_objective: Array) -> Array:
    """``||g|| (1 + ||x||) / (|l_start| + |l|)`` ``[B]``, finite also for a zero objective."""
    size, slope = 1 + _tree.norm(x), _tree.norm(gradient)
    scale = (jnp.abs(first_objective) + jnp.abs(objective)).astype(size.dtype)
    length = jnp.minimum(slope * size, _LONGEST_STEP * scale) / jnp.where(scale > 0, scale, 1)
    return jnp.where((scale == 0) & (slope > 0), _LONGEST_STEP, length)


def meets_tolerance(residual: KKTResidual, evaluation: Evaluation, controls: Controls) -> Array:
    """Whether state, adjoint and stationarity are all within tolerance, bool ``[B]``."""
    state = within_tolerance(residual.state, _tree.norm(evaluation.state), controls)
    adjoint = within_tolerance(residual.adjoint, _tree.norm(evaluation.adjoint), controls)
    stationarity = within_tolerance(residual.stationarity, jnp.ones(()), controls)
    return state & adjoint & stationarity


def guard(residual: KKTResidual, evaluation: Evaluation, controls: Controls) -> Array:
    """The state residual, zero within ``GUARD_SLACK`` of its tolerance, ``[B]``.

    All these are equilibria, whatever the size of the state that their tolerance is relative to.
    """
    within = within_tolerance(residual.state / GUARD_SLACK, _tree.norm(evaluation.state), controls)
    return jnp.where(within, 0, residual.state)


def size(residual: KKTResidual, evaluation: Evaluation) -> Array:
    """What grows when the iteration runs away, ``[B]``."""
    state = _tree.norm(evaluation.state) + residual.state
    return state + _tree.norm(evaluation.adjoint) + residual.adjoint
