"""Newton's method, its linear systems solved in Krylov spaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree
from jdeq.krylov import gmres

PyTree = Any

_DECREASE = 1e-4
"""Fraction of the first-order decrease of the residual that a step has to bring (Armijo)."""


class NewtonKrylovMemory(NamedTuple):
    """The step under trial.

    Attributes:
        anchor: where it set out from.
        direction: the Newton direction there, like the anchor.
        residual: norm of the residual there, ``[B]``; infinity before the first step of all.
        fraction: of the direction that was taken, ``[B]``.
        halvings: how often it has been halved, int32 ``[B]``.
    """

    anchor: PyTree
    direction: PyTree
    residual: Array
    fraction: Array
    halvings: Array


@dataclasses.dataclass(frozen=True)
class NewtonKrylov:
    """Newton's method for ``f(z) - z = 0``, without matrices (Knoll and Keyes 2004).

    Each direction solves ``(I - df/dz) d = f(z) - z`` by GMRES on Jacobian-vector products, per
    problem, to a relative ``forcing``; every product counts as an evaluation of the cell. A step
    that does not lower the residual is halved, from the point it set out from. Where Picard needs
    many steps, or diverges, it converges in a few, quadratically as ``forcing`` goes to zero. It
    needs forward mode of the cell.

    Attributes:
        dimension: largest dimension of a Krylov space, at least 1.
        forcing: relative tolerance of the linear solves, in (0, 1].
        halvings: largest number of halvings of a step, at least 0.

    Raises:
        ValueError: if an option is out of range.
    """

    dimension: int = 20
    forcing: float = 0.1
    halvings: int = 5

    def __post_init__(self) -> None:
        _options.check_count("NewtonKrylov", "dimension", self.dimension)
        _options.check_fraction("NewtonKrylov", "forcing", self.forcing)
        _options.check_count("NewtonKrylov", "halvings", self.halvings, least=0)

    def init(self, z: PyTree) -> NewtonKrylovMemory:
        """No step yet."""
        size = _tree.norm(z)
        return NewtonKrylovMemory(
            anchor=jax.tree.map(jnp.asarray, z),
            direction=_tree.zeros_like(z),
            residual=jnp.full_like(size, jnp.inf),
            fraction=jnp.ones_like(size),
            halvings=jnp.zeros(size.shape, jnp.int32),
        )

    def step(
        self, z: PyTree, fz: PyTree, memory: NewtonKrylovMemory, k: Array
    ) -> tuple[PyTree, NewtonKrylovMemory]:
        """Refused: Newton's method needs the map itself."""
        del z, fz, memory, k
        raise ValueError(
            "NewtonKrylov: it was asked for a step without the map, as joint methods and "
            "jdeq.adjoints.Unrolled do, but it needs Jacobian-vector products; take "
            "jdeq.solvers.Anderson() there."
        )

    def step_with_map(
        self,
        f: Callable[[PyTree], PyTree],
        z: PyTree,
        fz: PyTree,
        memory: NewtonKrylovMemory,
        k: Array,
        wanted: Array,
    ) -> tuple[PyTree, NewtonKrylovMemory, Array]:
        """A Newton step, or half of the last one again; see ``MapSolver.step_with_map``."""
        g = _tree.subtract(fz, z)
        residual = _tree.norm(g)
        allowed = (1 - _DECREASE * memory.fraction) * memory.residual
        # A step of an earlier solve is not under trial: its residual is no standard for this one.
        failed = (k > 0) & (residual > allowed) & (memory.halvings < self.halvings)

        _, push_forward = jax.linearize(f, z)
        direction, spent = gmres(
            lambda u: _tree.subtract(u, push_forward(u)),
            _tree.select(wanted & ~failed, g, _tree.zeros_like(g)),
            dimension=self.dimension,
            rtol=self.forcing,
        )
        memory = NewtonKrylovMemory(
            anchor=_tree.select(failed, memory.anchor, z),
            direction=_tree.select(failed, memory.direction, direction),
            residual=jnp.where(failed, memory.residual, residual),
            fraction=jnp.where(failed, memory.fraction / 2, 1),
            halvings=jnp.where(failed, memory.halvings + 1, 0),
        )
        z_next = _tree.add(memory.anchor, _tree.scale(memory.fraction, memory.direction))
        return z_next, memory, spent
