"""What a fixed-point solver is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jax import Array

PyTree = Any


@runtime_checkable
class MapSolver(Protocol):
    """A solver that evaluates or differentiates the map itself, besides being a ``Solver``."""

    def step_with_map(
        self,
        f: Callable[[PyTree], PyTree],
        z: PyTree,
        fz: PyTree,
        memory: PyTree,
        k: Array,
        wanted: Array,
    ) -> tuple[PyTree, PyTree, Array]:
        """Makes the next iterate, like ``Solver.step``.

        Args:
            f: the map, ``f(z) -> z``.
            z: the current iterate.
            fz: the map at ``z``.
            memory: what ``init`` or the last call returned.
            k: number of the step, int32 scalar, from 0.
            wanted: problems that have not converged yet, bool ``[B]``; no work is due for others.

        Returns:
            The next iterate, the next memory, and the evaluations of the map, or products with its
            Jacobian, that each problem took besides ``fz``, int32 ``[B]``.
        """
        ...


@runtime_checkable
class Solver(Protocol):
    """A pure ``init``/``step`` pair; the loop (``jdeq.iterate``) owns everything else.

    A solver is a frozen dataclass of options, hashable by value. It knows nothing of gradients,
    tolerances or step limits, and it treats the problems of a batch independently.
    """

    def init(self, z: PyTree) -> PyTree:
        """Returns the solver's memory for iterates like ``z`` (every leaf ``[B, ...]``)."""
        ...

    def step(self, z: PyTree, fz: PyTree, memory: PyTree, k: Array) -> tuple[PyTree, PyTree]:
        """Makes the next iterate.

        Args:
            z: the current iterate, every leaf ``[B, ...]``.
            fz: the map at ``z``, of the same structure.
            memory: what ``init`` or the last ``step`` returned.
            k: number of the step, int32 scalar, from 0.

        Returns:
            The next iterate and the next memory.
        """
        ...


@runtime_checkable
class InverseEstimator(Protocol):
    """A quasi-Newton solver: its memory holds an estimate of an inverse Jacobian."""

    def transposed_inverse(self, memory: PyTree, v: PyTree) -> PyTree:
        """The estimate of ``(I - df/dz)^{-T} v``, per problem.

        Args:
            memory: what the last ``step`` returned.
            v: a vector like ``z``, every leaf ``[B, ...]``.

        Returns:
            A vector like ``v``, linear in it.
        """
        ...
