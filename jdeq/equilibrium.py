"""The forward solve of one map: a solver in the loop, without a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _tree
from jdeq._standing import Report
from jdeq.iterate import Fold, Step, iterate
from jdeq.solution import Solution
from jdeq.solvers.base import MapSolver, Solver

PyTree = Any


class Controls(NamedTuple):
    """What may change between calls without recompiling.

    Attributes:
        rtol: relative tolerance, scalar or ``[B]``.
        atol: absolute tolerance, scalar or ``[B]``.
        budget: step limit at run time, int scalar, or None.
        memory: the solver's memory to go on with, or None to start anew.
        folded: first value of the fold over iterates, or None without one.
    """

    rtol: Any
    atol: Any
    budget: Any = None
    memory: PyTree = None
    folded: PyTree = None


class RunAux(NamedTuple):
    """What a run returns besides its solution, on request.

    Attributes:
        memory: the solver's memory after each problem's last step, to go on with; None if the run
            was not given one.
        folded: last value of the fold; None without a fold.
    """

    memory: PyTree
    folded: PyTree


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What fixes the compiled program of a run, besides the map.

    Attributes:
        solver: makes the next iterate.
        max_steps: limit on the steps.
        record: whether, or what, the history keeps.
        fold: ``fold(value, z, k) -> value``, a running value over the iterates, or None.
        compaction: number of smaller sizes that the batch may shrink to as problems finish.
    """

    solver: Solver
    max_steps: int
    record: bool | Callable[[PyTree], PyTree] = False
    fold: Callable[[PyTree, PyTree, Array], PyTree] | None = None
    compaction: int = 0


@dataclasses.dataclass(frozen=True)
class Equilibrium:
    """The map ``f(theta, inputs, z) -> z`` and how its fixed point is found.

    Attributes:
        bind: ``bind(theta, inputs)`` is the map ``z -> f(theta, inputs, z)``, a pure function.
            What it computes before it returns is computed once a loop. ``theta`` is shared by all
            problems, every leaf of ``inputs`` and ``z`` has the problem axis first.
        options: the solver and its limits.
    """

    bind: Callable[[PyTree, PyTree], Callable[[PyTree], PyTree]]
    options: RunOptions

    @classmethod
    def of(cls, f: Callable[[PyTree, PyTree, PyTree], PyTree], options: RunOptions) -> Equilibrium:
        """The equilibrium of ``f(theta, inputs, z)``."""
        return cls(lambda theta, inputs: partial(f, theta, inputs), options)

    def f(self, theta: PyTree, inputs: PyTree, z: PyTree) -> PyTree:
        """One evaluation of the map."""
        return self.bind(theta, inputs)(z)

    def run(self, theta: PyTree, inputs: PyTree, z0: PyTree, controls: Controls) -> Solution:
        """Iterates from ``z0`` until ``||f(z) - z|| <= atol + rtol ||f(z)||`` for every problem.

        Args:
            theta: what all problems share.
            inputs: what each problem has of its own.
            z0: the start.
            controls: tolerances, budget, and what to go on from.

        Returns:
            The solution; its ``aux`` is a ``RunAux``.
        """
        options = self.options
        tolerances = _tolerances(controls, _tree.problem_count(z0))

        def prepare(context: tuple[PyTree, Controls]) -> Step:
            inputs, controls = context
            return self._step(self.bind(theta, inputs), controls)

        solution, final = iterate(
            prepare,
            (inputs, tolerances),
            z0,
            options.solver.init(z0) if controls.memory is None else controls.memory,
            report=jax.eval_shape(_report, z0, z0, tolerances),
            max_steps=options.max_steps,
            budget=controls.budget,
            record=options.record,
            fold=None if options.fold is None else Fold(options.fold, controls.folded),
            keep_memory=controls.memory is not None,
            compaction=options.compaction,
        )
        return dataclasses.replace(solution, aux=RunAux(final.memory, final.folded))

    def _step(self, f: Callable[[PyTree], PyTree], controls: Controls) -> Step:
        solver = self.options.solver

        def step(z: PyTree, memory: PyTree, k: Array) -> tuple[PyTree, PyTree, Report]:
            fz = f(z)
            report = _report(z, fz, controls)
            if isinstance(solver, MapSolver):
                z_next, memory, products = solver.step_with_map(
                    f, z, fz, memory, k, ~report.converged
                )
                report = report._replace(evaluations=1 + products)
            else:
                z_next, memory = solver.step(z, fz, memory, k)
            return z_next, memory, report

        return step


def _report(z: PyTree, fz: PyTree, controls: Controls) -> Report:
    """What ``fz = f(z)`` says of ``z``: the lower its residual, the better."""
    size = _tree.norm(fz)
    residual = _tree.norm(_tree.subtract(fz, z))
    converged = within_tolerance(residual, size, controls)
    # What runs away from here was thrown by rounding: half of the digits are solved for.
    settled = residual < float(jnp.finfo(residual.dtype).eps) ** 0.5 * size
    return Report(residual, converged, residual, None, size + residual, settled=settled)


def _tolerances(controls: Controls, count: int) -> Controls:
    """The tolerances alone, one entry a problem ``[B]``."""
    rtol, atol = (jnp.broadcast_to(jnp.asarray(t), (count,)) for t in controls[:2])
    return Controls(rtol, atol)


def within_tolerance(residual: Array, size: Array, controls: Controls) -> Array:
    """``residual <= atol + rtol size``, entry by entry."""
    rtol = jnp.asarray(controls.rtol, residual.dtype)
    atol = jnp.asarray(controls.atol, residual.dtype)
    return residual <= atol + rtol * size
