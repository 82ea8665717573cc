"""What a method of the joint solve is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array

from jdeq.joint.augmented import AugmentedState, Evaluation, KKTResidual

PyTree = Any


class Context(NamedTuple):
    """What a step may need to know besides the iterate.

    Attributes:
        k: number of the step, int32 scalar, from 0.
        max_steps: the step limit in force, which decaying schedules span: ``max_steps`` of the
            solve, or the traced smaller one of it and ``step_budget`` where that is given.
        first_objective: objective at the start, ``[B]``.
        project: ``project(x) -> x`` on the constraint set of the batch at hand.
        constrained: whether there is a constraint at all.
    """

    k: Array
    max_steps: int | Array
    first_objective: Array
    project: Callable[[PyTree], PyTree]
    constrained: bool


@runtime_checkable
class LooksAhead(Protocol):
    """A method that wants the objective where the state goes next (`augmented.evaluate_ahead`).

    The next state that its ``step`` makes carries ``p``, the adjoint without ``dl/dz``, in place
    of ``mu``, and every leaf of its memory has the problem axis first.
    """

    def ahead(self, z: PyTree, fz: PyTree) -> PyTree:
        """Where the state goes from ``z``, given ``fz = f(z, x)``."""
        ...


@runtime_checkable
class JointMethod(Protocol):
    """Makes the next augmented state from one evaluation of the augmented map.

    A frozen dataclass of options, hashable by value. It costs no further evaluation of the cell,
    treats problems independently, and returns feasible inputs only.
    """

    def init(self, state: AugmentedState, max_steps: int | Array) -> PyTree:
        """The method's memory for states like ``state``, ``max_steps`` as in ``Context``."""
        ...

    def step(
        self,
        state: AugmentedState,
        evaluation: Evaluation,
        residual: KKTResidual,
        memory: PyTree,
        context: Context,
    ) -> tuple[AugmentedState, PyTree]:
        """Makes the next state.

        Args:
            state: the current augmented state, its ``x`` feasible.
            evaluation: the augmented map at ``state``.
            residual: its residuals there.
            memory: what ``init`` or the last ``step`` returned.
            context: number of the step, step limit and projection.

        Returns:
            The next state, its ``x`` feasible, and the next memory.
        """
        ...
