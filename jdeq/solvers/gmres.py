"""Restarted GMRES for affine maps."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from jdeq import _options
from jdeq.krylov import gmres
from jdeq.solvers.affine import AffineSolver, LinearMap

PyTree = Any


@dataclasses.dataclass(frozen=True)
class GMRES(AffineSolver):
    """Restarted GMRES on ``z = A z + b`` (Saad and Schultz 1986).

        jdeq.adjoints.Implicit(solver=GMRES())

    For affine maps only, as the adjoint equation is one: a solver of ``Implicit``,
    ``StateImplicit`` and ``ImplicitForward``. It needs no contraction, only that ``I - A`` is
    invertible. Every step of the loop is one cycle: the correction of least residual in a Krylov
    space of at most ``dimension``, per problem; a product with ``A`` is one evaluation of the map
    and is counted as one, besides the evaluation that measures the cycle's outcome. A limit on
    steps is a limit on cycles. Memory is ``dimension + 1`` vectors.

    On a nonlinear map it does not converge to a wrong point: the residual is measured, and the
    problem ends unconverged. Take ``NewtonKrylov`` there.

    Attributes:
        dimension: largest dimension of a Krylov space, at least 1. A system of fewer unknowns is
            solved in one cycle; a cycle that is too short for a system may make no progress.
        reduction: a cycle ends early once it has cut the residual to this fraction, in (0, 1].

    Raises:
        ValueError: if an option is out of range.
    """

    dimension: int = 20
    reduction: float = 1e-3

    def __post_init__(self) -> None:
        _options.check_count("GMRES", "dimension", self.dimension)
        _options.check_fraction("GMRES", "reduction", self.reduction)

    def correct(self, matvec: LinearMap, g: PyTree) -> tuple[PyTree, Array]:
        """One cycle; see ``AffineSolver.correct``."""
        return gmres(matvec, g, dimension=self.dimension, rtol=self.reduction)
