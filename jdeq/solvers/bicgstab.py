"""BiCGStab for affine maps."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from jdeq import _options
from jdeq.krylov import bicgstab
from jdeq.solvers.affine import AffineSolver, LinearMap

PyTree = Any


@dataclasses.dataclass(frozen=True)
class BiCGStab(AffineSolver):
    """Stabilised biconjugate gradients on ``z = A z + b`` (van der Vorst 1992).

        jdeq.adjoints.Implicit(solver=BiCGStab())

    For affine maps only, as the adjoint equation is one; what ``GMRES`` says of uses, counts and
    nonlinear maps holds here too. It needs no contraction and keeps eight vectors however long it
    runs, where ``GMRES`` keeps its whole Krylov space; an iteration takes two products. Its
    residual falls irregularly, and where eigenvalues of ``I - A`` lie close to the imaginary axis
    it breaks down for good: take ``GMRES``. A problem that breaks down is started again from its
    best iterate by the next step of the loop.

    Attributes:
        iterations: limit on the iterations between two restarts, that is on those of one step of
            the loop, at least 1.
        reduction: a step of the loop ends early once it has cut the residual to this fraction, in
            (0, 1].

    Raises:
        ValueError: if an option is out of range.
    """

    iterations: int = 100
    reduction: float = 1e-3

    def __post_init__(self) -> None:
        _options.check_count("BiCGStab", "iterations", self.iterations)
        _options.check_fraction("BiCGStab", "reduction", self.reduction)

    def correct(self, matvec: LinearMap, g: PyTree) -> tuple[PyTree, Array]:
        """Iterations up to the next restart; see ``AffineSolver.correct``."""
        return bicgstab(matvec, g, iterations=self.iterations, rtol=self.reduction)
