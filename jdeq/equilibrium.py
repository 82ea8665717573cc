"""The forward solve of one map: a solver in the loop, without a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jdeq import _tree
from jdeq.iterate import Report, iterate
from jdeq.solution import Solution
from jdeq.solvers.base import MapSolver, Solver

PyTree = Any


class Controls(NamedTuple):
    """What may change between calls without recompiling.

    Attributes:
        rtol: relative tolerance, scalar.
        atol: absolute tolerance, scalar.
        budget: step limit at run time, int scalar, or None.
    """

    rtol: Any
    atol: Any
    budget: Any = None


@dataclasses.dataclass(frozen=True)
class Equilibrium:
    """The map ``f(theta, inputs, z) -> z`` and how its fixed point is found.

    Attributes:
        f: a pure function; ``theta`` is shared by all problems, every leaf of ``inputs`` and ``z``
            has the problem axis first.
        solver: makes the next iterate.
        max_steps: limit on the steps.
        record: whether, or what, the history keeps.
    """

    f: Callable[[PyTree, PyTree, PyTree], PyTree]
    solver: Solver
    max_steps: int
    record: bool | Callable[[PyTree], PyTree] = False

    def run(self, theta: PyTree, inputs: PyTree, z0: PyTree, controls: Controls) -> Solution:
        """Iterates from ``z0`` until ``||f(z) - z|| <= atol + rtol ||f(z)||`` for every problem."""

        def step(z: PyTree, memory: PyTree, k: Array) -> tuple[PyTree, PyTree, Report]:
            fz = self.f(theta, inputs, z)
            size = _tree.norm(fz)
            residual = _tree.norm(_tree.subtract(fz, z))
            converged = within_tolerance(residual, size, controls)
            spent = None
            if isinstance(self.solver, MapSolver):
                z_next, memory, products = self.solver.step_with_map(
                    partial(self.f, theta, inputs), z, fz, memory, ~converged
                )
                spent = 1 + products
            else:
                z_next, memory = self.solver.step(z, fz, memory, k)
            report = Report(residual, converged, residual, None, size + residual, spent)
            return z_next, memory, report

        solution, _ = iterate(
            step,
            z0,
            self.solver.init(z0),
            max_steps=self.max_steps,
            budget=controls.budget,
            record=self.record,
        )
        return solution


def within_tolerance(residual: Array, size: Array, controls: Controls) -> Array:
    """``residual <= atol + rtol size``, entry by entry."""
    rtol = jnp.asarray(controls.rtol, residual.dtype)
    atol = jnp.asarray(controls.atol, residual.dtype)
    return residual <= atol + rtol * size
