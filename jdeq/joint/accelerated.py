"""The paper's method: the relaxed KKT map under Anderson acceleration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree
from jdeq.joint.augmented import AugmentedState, Evaluation, KKTResidual
from jdeq.joint.method import Context
from jdeq.solvers.anderson import Anderson
from jdeq.solvers.base import Solver

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Accelerated:
    """A fixed-point solver on the relaxed KKT map of all three blocks (Gurumurthy et al. 2021).

    The map of ``Descent`` with plain gradient steps ``x - step_size g``, its image mixed by
    ``solver`` over the concatenated vector ``(z, x, mu)`` of each problem. Unlike the published
    code, what is evaluated is always feasible: mixtures are projected again. With the published
    settings: ``jdeq.joint.published``.

    Attributes:
        solver: one of ``jdeq.solvers``.
        step_size: step on x, a positive number or an optax schedule of the step's number.
        state_relaxation: in (0, 1], before mixing.
        adjoint_relaxation: in (0, 1], before mixing.
        normalize: whether ``g / ||g||`` takes the place of ``g``, so that every step before
            projection and mixing has the length ``step_size``.

    Raises:
        TypeError: if ``solver`` is not a solver, or ``normalize`` not a bool.
        ValueError: if an option is out of range.
    """

    solver: Solver = Anderson(window=20, kind="I")
    step_size: float | Callable[[Array], Array] = 0.1
    state_relaxation: float = 0.8
    adjoint_relaxation: float = 0.6
    normalize: bool = False

    def __post_init__(self) -> None:
        _options.check_instance(
            "Accelerated", "solver", self.solver, Solver, "jdeq.solvers.Anderson()"
        )
        if not callable(self.step_size):
            _options.check_positive("Accelerated", "step_size", self.step_size)
        _options.check_fraction("Accelerated", "state_relaxation", self.state_relaxation)
        _options.check_fraction("Accelerated", "adjoint_relaxation", self.adjoint_relaxation)
        _options.check_switch("Accelerated", "normalize", self.normalize)

    def init(self, state: AugmentedState, max_steps: int | Array) -> PyTree:
        """The solver's memory for augmented states."""
        del max_steps
        return self.solver.init(state)

    def step(
        self,
        state: AugmentedState,
        evaluation: Evaluation,
        residual: KKTResidual,
        memory: PyTree,
        context: Context,
    ) -> tuple[AugmentedState, PyTree]:
        """One step of the solver on the relaxed KKT map."""
        del residual
        rate = self.step_size(context.k) if callable(self.step_size) else self.step_size
        gradient = evaluation.gradient
        if self.normalize:
            length = _tree.norm(gradient)
            gradient = _tree.scale(1 / jnp.where(length > 0, length, 1), gradient)
        moved = jax.tree.map(lambda x, g: x - jnp.asarray(rate, x.dtype) * g, state.x, gradient)
        image = AugmentedState(
            _tree.relax(state.z, evaluation.state, self.state_relaxation),
            context.project(moved),
            _tree.relax(state.mu, evaluation.adjoint, self.adjoint_relaxation),
        )
        mixed, memory = self.solver.step(state, image, memory, context.k)
        return mixed._replace(x=context.project(mixed.x)), memory
