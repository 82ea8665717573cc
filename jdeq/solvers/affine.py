"""What solvers of affine maps share: linear systems seen through a map that is evaluated."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jdeq import _tree

PyTree = Any
LinearMap = Callable[[PyTree], PyTree]


class AffineSolver(abc.ABC):
    """A ``MapSolver`` for affine maps ``z -> A z + b``.

    It corrects ``z`` by ``d`` with ``(I - A) d = f(z) - z``. The adjoint equation
    ``u = J^T u + v`` is of this kind, and so are the linear equations of forward mode. Products
    with ``A`` are differences of ``f``, so that nothing of the map is asked but its evaluation. The
    loop measures the residual of the corrected point with a fresh evaluation and asks for another
    correction until it is within tolerance: rounding and breakdowns of one correction are made good
    by the next. Of a map that is not affine these differences are no derivative, and the residual
    shows it.
    """

    def init(self, z: PyTree) -> tuple[()]:
        """Corrections start from the current iterate and remember nothing."""
        del z
        return ()

    def step(self, z: PyTree, fz: PyTree, memory: tuple[()], k: Array) -> tuple[PyTree, tuple[()]]:
        """Refused: a correction takes evaluations of the map."""
        del z, fz, memory, k
        name = type(self).__name__
        raise ValueError(
            f"{name}: it was asked for a step without the map, as joint methods and "
            f"jdeq.adjoints.Unrolled do, but it evaluates the map itself; take "
            f"jdeq.solvers.Anderson() there, and {name} as solver of jdeq.adjoints.Implicit."
        )

    def step_with_map(
        self, f: LinearMap, z: PyTree, fz: PyTree, memory: tuple[()], k: Array, wanted: Array
    ) -> tuple[PyTree, tuple[()], Array]:
        """``z + d`` with ``(I - A) d = f(z) - z`` solved; see ``MapSolver.step_with_map``."""
        del k
        g = _tree.select(wanted, _tree.subtract(fz, z), _tree.zeros_like(z))
        change, spent = self.correct(complement(f, z, fz), g)
        return _tree.add(z, change), memory, spent

    @abc.abstractmethod
    def correct(self, matvec: LinearMap, g: PyTree) -> tuple[PyTree, Array]:
        """Solves ``matvec(d) = g`` from zero: ``d``, and the products that each problem took."""


def complement(f: LinearMap, z: PyTree, fz: PyTree) -> LinearMap:
    """``v -> (I - A) v`` of an affine map ``f`` with linear part ``A``, from one evaluation each.

    The difference ``f(z + w) - f(z)`` is taken with ``w`` along ``v`` and as long as ``z`` and
    ``f(z)`` together, so that it loses no more than a few units in the last place.
    """
    length = _tree.norm(z) + _tree.norm(fz)
    length = jnp.where(length > 0, length, 1)

    def matvec(v: PyTree) -> PyTree:
        size = _tree.norm(v)
        safe = jnp.where(size > 0, size, 1)
        there = f(_tree.add(z, _tree.scale(length / safe, v)))
        moved = _tree.scale(size / length, _tree.subtract(there, fz))
        return _tree.subtract(v, moved)

    return matvec
