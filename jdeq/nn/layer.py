"""A layer whose output is the equilibrium of a cell."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jdeq.adjoints.base import Adjoint
from jdeq.fixed_point import deq
from jdeq.solution import Solution
from jdeq.solvers.base import Solver

PyTree = Any


@dataclasses.dataclass(frozen=True)
class _CellFunction:
    """`cell(params, z, x[, data])` of a module; equal graphs are equal, so nothing recompiles."""

    graph: nnx.GraphDef

    def __call__(self, params: PyTree, z: PyTree, *inputs: PyTree) -> PyTree:
        return nnx.merge(self.graph, params)(z, *inputs)


class DEQ(nnx.Module):
    """Deep equilibrium layer (Bai, Kolter, Koltun, 2019): `layer(x) = z*`, `z* = cell(z*, x)`.

    Train it as any other module, with `nnx.grad` and `nnx.jit`: gradients in the cell's parameters
    and in `x` are those of the equilibrium.

    Args:
        cell: module called as `cell(z, x)`, or `cell(z, x, data)` where data is given, returning
            the next state. It draws no random numbers: draw dropout masks beforehand
            (`jdeq.nn.variational_masks`) and pass them as `data`. If it has a method
            `initial_state(batch)`, solves start there.
        solver: one of `jdeq.solvers`; default `Anderson()`.
        adjoint: one of `jdeq.adjoints`; default `Implicit()`.
        rtol: relative tolerance of a solve.
        atol: absolute tolerance of a solve.
        max_steps: limit on a solve's steps.

    Raises:
        TypeError: at construction, if the cell holds random number generators.
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-6,
        max_steps: int = 100,
    ):
        if jax.tree.leaves(nnx.state(cell, nnx.RngState)):
            raise TypeError(
                f"DEQ got a cell ({type(cell).__name__}) that draws random numbers, but an "
                "equilibrium needs a deterministic one: draw before the solve, for example with "
                "jdeq.nn.variational_masks, and pass the result as data."
            )
        self.cell = cell
        self.solver = solver
        self.adjoint = adjoint
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps

    def __call__(self, x: PyTree, z0: PyTree = None, *, data: PyTree = None) -> PyTree:
        """The equilibrium for inputs `x`, every leaf `[B, ...]`.

        Args:
            x: inputs of B problems.
            z0: state to start from; the cell's `initial_state(B)` when None.
            data: further constants of each problem, see `jdeq.deq`.

        Returns:
            The state `z*`, like `z0`. Where a solve did not converge it is the best iterate: use
            `solve` to see.

        Raises:
            ValueError: if `z0` is None and the cell has no `initial_state`.
        """
        return self.solve(x, z0, data=data).value

    def solve(self, x: PyTree, z0: PyTree = None, *, data: PyTree = None) -> Solution:
        """Like calling the layer, but returns the whole `jdeq.Solution`."""
        graph, params = nnx.split(self.cell)
        return deq(
            _CellFunction(graph),
            params,
            x,
            self._start(x) if z0 is None else z0,
            data=data,
            solver=self.solver,
            adjoint=self.adjoint,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
        )

    def _start(self, x: PyTree) -> PyTree:
        if not hasattr(self.cell, "initial_state"):
            raise ValueError(
                f"DEQ was called without z0, and its cell ({type(self.cell).__name__}) has no "
                "initial_state(batch): pass z0, or give the cell that method."
            )
        return self.cell.initial_state(jax.tree.leaves(x)[0].shape[0])
