"""The joint iteration of a pure problem, without a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree
from jdeq.equilibrium import Controls
from jdeq.iterate import Step, iterate, step_limit
from jdeq.joint import augmented
from jdeq.joint.augmented import AugmentedState
from jdeq.joint.method import Context, JointMethod, LooksAhead
from jdeq.joint.problem import PureProblem, Theta
from jdeq.solution import Result, Solution

PyTree = Any


class JointAux(NamedTuple):
    """Further outputs of a solve of an input problem.

    Attributes:
        objective: the objective at the returned ``(z, x)``, ``[B]``; a constant to autodiff
            (``input_value`` returns a differentiable one).
    """

    objective: Array


class Given(NamedTuple):
    """The arguments of a solve that gradients may flow to.

    Attributes:
        theta: what all problems share.
        target: one entry a problem.
        rest: ``()``, or ``(data,)`` with one entry a problem.
    """

    theta: Theta
    target: PyTree
    rest: tuple


class Units(NamedTuple):
    """Scales of a problem, constants to autodiff.

    Attributes:
        objective: ``|l at the start| + |l|``, or 1 where that is zero, ``[B]``.
        size: ``1 + ||x||``, ``[B]``.
        state: the power of two nearest to the largest entry of z, or 1 where z is zero, ``[B]``.
    """

    objective: Array
    size: Array
    state: Array


class _Memory(NamedTuple):
    """What the joint iteration remembers.

    Attributes:
        method: the method's memory.
        confirm: whether the last evaluation was ahead of its iterate and within tolerance, so that
            x is held and the next one is exact, bool ``[B]``.
    """

    method: PyTree
    confirm: Array


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """What fixes the loop of a compiled program, beside what is iterated.

    Attributes:
        max_steps: limit on the iterations.
        history: whether, or what, the history keeps.
        compaction: number of smaller sizes that the batch may shrink to as problems finish.
        patience: iterations without a lower objective after which a problem stops, or None.
    """

    max_steps: int
    history: bool | Callable[[AugmentedState], PyTree] = False
    compaction: int = 0
    patience: int | None = None

    def check(self, owner: str) -> None:
        """Refuses options out of range."""
        _options.check_count(owner, "max_steps", self.max_steps)
        _options.check_history(owner, self.history)
        _options.check_compaction(owner, self.compaction, self.history)
        if self.patience is not None:
            _options.check_count(owner, "patience", self.patience)


@dataclasses.dataclass(frozen=True)
class JointRun:
    """How the KKT point of a pure problem is found.

    Attributes:
        pure: the problem.
        method: makes the next augmented state.
        loop: limits of the loop.
    """

    pure: PureProblem
    method: JointMethod
    loop: LoopOptions

    def __call__(self, given: Given, start: AugmentedState, controls: Controls) -> Solution:
        """Iterates the augmented map from ``start`` until every problem meets the KKT tolerance."""
        start = start._replace(x=projection(self.pure, given)(start.x))
        first_objective = self.pure.objective(
            given.theta, start.z, start.x, given.target, given.rest
        )

        def prepare(context: tuple[PyTree, tuple, Array]) -> Step:
            target, rest, first_objective = context
            return self._step(Given(given.theta, target, rest), first_objective, controls)

        memory = _Memory(
            self.method.init(start, self._limit(controls)), jnp.zeros_like(first_objective, bool)
        )
        solution, final = iterate(
            prepare,
            (given.target, given.rest, first_objective),
            start,
            memory,
            report=jax.eval_shape(
                partial(augmented.report, self.pure),
                given.theta,
                given.rest,
                start,
                augmented.shapes(start, first_objective),
                first_objective,
                controls,
            ),
            max_steps=self.loop.max_steps,
            budget=controls.budget,
            record=self.loop.history,
            patience=self.loop.patience,
            measure_best_last=isinstance(self.method, LooksAhead),
            compaction=self.loop.compaction,
        )
        solution = dataclasses.replace(solution, aux=JointAux(final.merit))
        if self.loop.patience is None or not isinstance(self.method, LooksAhead):
            return solution
        return self._measured(given, solution, first_objective)

    def _measured(self, given: Given, solution: Solution, first_objective: Array) -> Solution:
        """With the exact residuals and objectives of problems that stopped for lack of progress.

        The iteration looked ahead of their states when it chose among them.
        """
        at = solution.value
        evaluation = augmented.evaluate(self.pure, given.theta, given.target, given.rest, at)
        exact = augmented.kkt_residual(
            self.pure, given.theta, given.rest, at, evaluation, first_objective
        )
        stopped = solution.result == Result.stagnated
        objective = jnp.where(stopped, evaluation.objective, solution.aux.objective)
        return dataclasses.replace(
            solution,
            residual=_tree.select(stopped, exact, solution.residual),
            steps=solution.steps + stopped.astype(jnp.int32),
            aux=JointAux(objective),
        )

    def _limit(self, controls: Controls) -> int | Array:
        """The step limit in force: static without a budget, else an int32 scalar."""
        if controls.budget is None:
            return self.loop.max_steps
        return step_limit(self.loop.max_steps, controls.budget)

    def _step(self, given: Given, first_objective: Array, controls: Controls) -> Step:
        """The joint iteration of the problems that ``given`` holds."""
        project = projection(self.pure, given)
        ahead = self.method.ahead if isinstance(self.method, LooksAhead) else None
        limit = self._limit(controls)

        def step(state: AugmentedState, memory: _Memory, k: Array):
            place = (self.pure, given.theta, given.target, given.rest, state)
            if ahead is None:
                exact = jnp.ones_like(memory.confirm)
                evaluation = augmented.evaluate(*place)
            else:
                # The first adjoint is the caller's, unless it is zero; the last is the best's.
                complete = (k == 0) & (_tree.norm(state.mu) > 0) | (k == limit - 1)
                exact = memory.confirm | complete
                state, evaluation = augmented.evaluate_ahead(*place, ahead, exact, complete)
            report = augmented.report(
                self.pure, given.theta, given.rest, state, evaluation, first_objective, controls
            )
            constrained = self.pure.project is not None
            context = Context(k, limit, first_objective, project, constrained)
            new_state, method_memory = self.method.step(
                state, evaluation, report.residual, memory.method, context
            )
            confirm = report.converged & ~exact
            if ahead is not None:
                new_state = new_state._replace(x=_tree.select(confirm, state.x, new_state.x))
                method_memory = _tree.select(confirm, memory.method, method_memory)
            report = report._replace(converged=report.converged & exact, refined=state)
            return new_state, _Memory(method_memory, confirm), report

        return step

    def units(self, given: Given, start: AugmentedState, solution: Solution) -> Units:
        """The scales of objective, input and state at a solution."""
        start = start._replace(x=projection(self.pure, given)(start.x))
        at_start, at_end = (
            self.pure.objective(given.theta, at.z, at.x, given.target, given.rest)
            for at in (start, solution.value)
        )
        scale = jnp.abs(at_start) + jnp.abs(at_end)
        state, _ = _tree.in_range(solution.value.z)
        return Units(jnp.where(scale > 0, scale, 1), 1 + _tree.norm(solution.value.x), state)

    def augmented_map(
        self, theta: Theta, inputs: tuple[PyTree, tuple, Units], at: AugmentedState
    ) -> AugmentedState:
        """``(f, P(x - size^2 g), (df/dz)^T mu + dl/dz)`` of state and objective in their own units.

        Its fixed points are the KKT points of the problem with ``z / state`` for ``z`` and
        ``l / objective`` for ``l``, whose adjoint is ``mu state / objective``: no block of the map
        depends on the caller's units of either.

        Args:
            theta: what all problems share.
            inputs: ``(target, rest, units)``, one entry a problem.
            at: the augmented state.

        Returns:
            Its image.
        """
        target, rest, units = inputs

        def cell(theta: Theta, inputs: tuple, z: PyTree) -> PyTree:
            z = _tree.scale(units.state, z)
            return _tree.scale(1 / units.state, self.pure.cell(theta, inputs, z))

        def objective(theta: Theta, z: PyTree, *given: PyTree) -> Array:
            z = _tree.scale(units.state, z)
            return self.pure.objective(theta, z, *given) / units.objective

        scaled = dataclasses.replace(self.pure, cell=cell, objective=objective)
        evaluation = augmented.evaluate(scaled, theta, target, rest, at)
        x = _tree.subtract(at.x, _tree.scale(units.size**2, evaluation.gradient))
        if self.pure.project is not None:
            x = self.pure.project(theta, x, rest)
        return AugmentedState(evaluation.state, x, evaluation.adjoint)


@dataclasses.dataclass(frozen=True)
class Found:
    """Stands in for the joint solve where its solution is there already.

    To ``JointAdjoint.solve`` the solution is part of the start, which has no derivative.

    Attributes:
        run: the joint solve.
    """

    run: JointRun

    def __call__(
        self, given: Given, found: tuple[AugmentedState, Solution], controls: Controls
    ) -> Solution:
        """The solution that was found."""
        return found[1]

    def units(
        self, given: Given, found: tuple[AugmentedState, Solution], solution: Solution
    ) -> Units:
        """See ``JointRun.units``."""
        return self.run.units(given, found[0], solution)

    @property
    def augmented_map(self) -> Callable[..., AugmentedState]:
        """See ``JointRun.augmented_map``."""
        return self.run.augmented_map

    @property
    def loop(self) -> LoopOptions:
        """See ``JointRun``."""
        return self.run.loop


def projection(pure: PureProblem, given: Given) -> Callable[[PyTree], PyTree]:
    """``project(x)`` for the batch at hand; the identity where there is no constraint."""
    project = pure.project
    if project is None:
        return lambda x: x
    return lambda x: project(given.theta, x, given.rest)


def objective_zeros(pure: PureProblem, given: Given, start: AugmentedState) -> Array:
    """Zeros like the objective, ``[B]``."""
    losses = jax.eval_shape(pure.objective, given.theta, start.z, start.x, given.target, given.rest)
    return jnp.zeros(losses.shape, losses.dtype)
