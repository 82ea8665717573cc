"""The naive baseline: a full forward and adjoint solve for every step on the input."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jdeq import _options, _tree
from jdeq._shards import automatic, vary_alike
from jdeq._standing import Report
from jdeq.adjoints.state_implicit import StateImplicit
from jdeq.equilibrium import Controls, Equilibrium, RunOptions
from jdeq.iterate import Step, iterate
from jdeq.joint import augmented
from jdeq.joint.augmented import AugmentedState
from jdeq.joint.descent import check_optimizer
from jdeq.joint.problem import InputProblem, PureProblem, Theta, purify
from jdeq.joint.run import Given, JointAux, LoopOptions, objective_zeros, projection
from jdeq.joint.solve import check_arguments
from jdeq.solution import Solution, constant_but_value, places
from jdeq.solvers.anderson import Anderson
from jdeq.solvers.base import Solver

PyTree = Any


@dataclasses.dataclass(frozen=True)
class InnerSolve:
    """How the nested method solves for the state, or the adjoint, at each input.

    Attributes:
        solver: one of ``jdeq.solvers``.
        max_steps: steps at each input, at least 1. The first measures the start: with a limit of 1
            nothing is solved.
        rtol: relative tolerance at which a problem stops early; 0 never does.
        warm_start: whether to start from the solution at the last input instead of the start.

    Raises:
        TypeError: if ``solver`` is not a solver.
        ValueError: if an option is out of range.
    """

    solver: Solver = Anderson()
    max_steps: int = 50
    rtol: float = 1e-3
    warm_start: bool = True

    def __post_init__(self) -> None:
        _options.check_instance(
            "InnerSolve", "solver", self.solver, Solver, "jdeq.solvers.Anderson()"
        )
        _options.check_count("InnerSolve", "max_steps", self.max_steps)
        _options.check_nonnegative("InnerSolve", "rtol", self.rtol)


def nested_solve(
    problem: InputProblem,
    params: PyTree,
    target: PyTree,
    x0: PyTree,
    z0: PyTree,
    *,
    data: PyTree = None,
    optimizer: optax.GradientTransformation | None = None,
    forward: InnerSolve | None = None,
    backward: InnerSolve | None = None,
    adjoint: StateImplicit | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-8,
    max_steps: int = 50,
    step_budget: int | Array | None = None,
    history: bool | Callable[[AugmentedState], PyTree] = False,
    compaction: int = 0,
    patience: int | None = None,
) -> Solution:
    """Minimises over the input by gradient descent through the equilibrium.

    Each of the ``max_steps`` steps solves the equilibrium at the current x, then its adjoint
    equation, then moves x by the optimiser. This is what the joint solve is compared with
    (Gurumurthy et al. 2021, section 4).

    Args:
        problem: see ``joint_solve``.
        params: see ``joint_solve``.
        target: see ``joint_solve``.
        x0: see ``joint_solve``.
        z0: see ``joint_solve``.
        data: see ``joint_solve``.
        optimizer: any optax transformation; None is ``optax.adam(0.1)``.
        forward: how the state is solved for; default ``InnerSolve()``.
        backward: how the adjoint is solved for; default as ``forward``.
        adjoint: gradient of ``value.z`` at constant x; default ``StateImplicit()``.
        rtol: KKT tolerance, as for ``joint_solve``.
        atol: KKT tolerance, as for ``joint_solve``.
        max_steps: steps on x, at least 1.
        step_budget: further limit on them that may be traced; the optimiser's schedule is its own.
        history: as for ``joint_solve``, one row a step on x.
        compaction: as for ``joint_solve``, between steps on x.
        patience: as for ``joint_solve``, in steps on x.

    Returns:
        A ``Solution`` as ``joint_solve`` returns it. ``steps`` counts evaluations of the cell and
        vector-Jacobian products of it, those of the inner solves included. Iterates are compared,
        and ``history.merit`` is, by ``l + mu . (f - z)``: the objective at the equilibrium of x up
        to the squared error of the inner solves (``l + |mu . (f - z)|`` where that correction
        exceeds half of ``l``). ``aux.objective`` is ``l`` at the returned ``(z, x)``.

    Raises:
        TypeError: as ``joint_solve``.
        ValueError: as ``joint_solve``.
    """
    optimizer = _DEFAULT_OPTIMIZER if optimizer is None else optimizer
    forward = InnerSolve() if forward is None else forward
    backward = forward if backward is None else backward
    adjoint = StateImplicit() if adjoint is None else adjoint
    check_optimizer("nested_solve", optimizer)
    for name, inner in (("forward", forward), ("backward", backward)):
        _options.check_instance("nested_solve", name, inner, InnerSolve, "jdeq.joint.InnerSolve()")
    _options.check_instance(
        "nested_solve", "adjoint", adjoint, StateImplicit, "jdeq.adjoints.StateImplicit()"
    )
    controls = Controls(rtol, atol, step_budget)
    loop = LoopOptions(max_steps, history, compaction, patience)
    arguments = check_arguments(
        "nested_solve", problem, params, target, x0, z0, data, None, controls, loop
    )
    return _nested_solve(
        arguments,
        controls,
        problem=problem,
        method=Nested(optimizer, forward, backward),
        adjoint=adjoint,
        loop=loop,
    )


_DEFAULT_OPTIMIZER = optax.adam(0.1)

_SMALL = 0.5
"""Share of the objective up to which the correction for an inexact state is taken for one."""


@dataclasses.dataclass(frozen=True)
class Nested:
    """Options of the nested method that fix its compiled program."""

    optimizer: optax.GradientTransformation
    forward: InnerSolve
    backward: InnerSolve


class _Memory(NamedTuple):
    optimizer: PyTree
    first_objective: Array


@functools.partial(jax.jit, static_argnames=("problem", "method", "adjoint", "loop"))
@automatic(places)
def _nested_solve(
    arguments: tuple[PyTree, PyTree, tuple, AugmentedState],
    controls: Controls,
    *,
    problem: InputProblem,
    method: Nested,
    adjoint: StateImplicit,
    loop: LoopOptions,
) -> Solution:
    arguments, controls = vary_alike((arguments, controls))
    params, target, rest, start = arguments
    pure, theta = purify("nested_solve", problem, params, target, start.x, start.z, rest)
    run = NestedRun(pure, method, loop)
    given = Given(theta, target, rest)
    start = jax.lax.stop_gradient(start)
    solution = adjoint.solve(run, pure.cell, loop.max_steps, given, start, controls, None)
    return constant_but_value(solution)


@dataclasses.dataclass(frozen=True)
class NestedRun:
    """The nested iteration of a pure problem, without a gradient; see ``JointRun``."""

    pure: PureProblem
    method: Nested
    loop: LoopOptions

    def __call__(self, given: Given, start: AugmentedState, controls: Controls) -> Solution:
        """Alternates full solves and steps on x until every problem meets the KKT tolerance."""
        start = start._replace(x=projection(self.pure, given)(start.x))

        def prepare(context: tuple[PyTree, tuple, AugmentedState]) -> Step:
            target, rest, start = context
            return self._step(Given(given.theta, target, rest), start, controls)

        zeros = objective_zeros(self.pure, given, start)
        memory = _Memory(jax.vmap(self.method.optimizer.init)(start.x), zeros)
        solution, _ = iterate(
            prepare,
            (given.target, given.rest, start),
            start,
            memory,
            report=jax.eval_shape(
                functools.partial(_report, self.pure),
                given.theta,
                given.rest,
                start,
                augmented.shapes(start, zeros),
                zeros,
                controls,
            ),
            max_steps=self.loop.max_steps,
            budget=controls.budget,
            record=self.loop.history,
            patience=self.loop.patience,
            compaction=self.loop.compaction,
        )
        at = solution.value
        objective = self.pure.objective(given.theta, at.z, at.x, given.target, given.rest)
        return dataclasses.replace(solution, aux=JointAux(objective))

    def _step(self, given: Given, start: AugmentedState, controls: Controls) -> Step:
        """The nested iteration of the problems that ``given`` holds."""
        project = projection(self.pure, given)

        def step(state: AugmentedState, memory: _Memory, k: Array):
            state, spent = self._infer(given, start, state)
            evaluation = augmented.evaluate(self.pure, given.theta, given.target, given.rest, state)
            first = jnp.where(k == 0, evaluation.objective, memory.first_objective)
            report = _report(
                self.pure, given.theta, given.rest, state, evaluation, first, controls
            )._replace(evaluations=spent + 1, refined=state)
            updates, moments = jax.vmap(self.method.optimizer.update)(
                evaluation.gradient, memory.optimizer, state.x
            )
            x = project(optax.apply_updates(state.x, updates))
            return state._replace(x=x), _Memory(moments, first), report

        return step

    def _infer(
        self, given: Given, start: AugmentedState, state: AugmentedState
    ) -> tuple[AugmentedState, Array]:
        """State and adjoint at ``state.x``, and what they cost, int ``[B]``."""
        forward, backward = self.method.forward, self.method.backward
        theta, inputs = given.theta, (state.x, *given.rest)

        at = Equilibrium.of(self.pure.cell, RunOptions(forward.solver, forward.max_steps))
        z0 = state.z if forward.warm_start else start.z
        inner = at.run(theta, inputs, z0, Controls(forward.rtol, 0.0))
        z = inner.value

        _, pull_back = jax.vjp(lambda z: self.pure.cell(theta, inputs, z), z)
        loss_z = jax.grad(
            lambda z: jnp.sum(self.pure.objective(theta, z, state.x, given.target, given.rest))
        )(z)
        adjoint_map = Equilibrium(
            lambda theta, inputs: lambda mu: _tree.add(pull_back(mu)[0], loss_z),
            RunOptions(backward.solver, backward.max_steps),
        )
        mu0 = state.mu if backward.warm_start else start.mu
        adjoint = adjoint_map.run(theta, inputs, mu0, Controls(backward.rtol, 0.0))
        return AugmentedState(z, state.x, adjoint.value), inner.steps + adjoint.steps


def _report(
    pure: PureProblem,
    theta: Theta,
    rest: tuple,
    at: AugmentedState,
    evaluation: augmented.Evaluation,
    first_objective: Array,
    controls: Controls,
) -> Report:
    """What is thought of ``at``, whose state is an equilibrium up to the inner tolerance."""
    report = augmented.report(pure, theta, rest, at, evaluation, first_objective, controls)
    return report._replace(merit=_merit(at, evaluation), guard=None)


def _merit(state: AugmentedState, evaluation: augmented.Evaluation) -> Array:
    """``l + mu . (f - z)``, the objective at the equilibrium up to the squared error of z, ``[B]``.

    Inner solves stop at a tolerance; of iterates that differ by less than that costs, the objective
    at ``z`` itself would choose one whose error happens to flatter it. Where the correction is no
    small part of the objective it estimates nothing, and counts against the iterate.
    """
    objective = evaluation.objective
    error = _tree.dot(state.mu, _tree.subtract(evaluation.state, state.z))
    small = jnp.abs(error) <= _SMALL * jnp.abs(objective)
    return objective + jnp.where(small, error, jnp.abs(error))
