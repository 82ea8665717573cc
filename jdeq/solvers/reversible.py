"""The reversible two-state iteration."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Reversible:
    """Two states that update each other in turn, so that every step can be undone.

        a_{k+1} = (1 - damping) a_{k-1} + damping f(a_k)

    with ``a_{-1} = a_0 = z0``: the coupled iteration of reversible equilibrium models (McCallum,
    Arora, Foster 2025), whose two states are the even and the odd ``a``, written with one
    evaluation of ``f`` a step. Its fixed points are those of ``f``. It converges where every
    eigenvalue of ``t^2 = (1 - damping) + damping j t``, ``j`` an eigenvalue of ``df/dz``, lies
    inside the unit circle, which it does for every contraction.

    Attributes:
        damping: weight of the new evaluation, in (0, 1). A step is undone by a division by
            ``1 - damping``, which amplifies rounding the more the nearer it is to one.

    Raises:
        ValueError: if ``damping`` is outside (0, 1).
    """

    damping: float = 0.5

    def __post_init__(self) -> None:
        _options.check_fraction("Reversible", "damping", self.damping)
        if self.damping == 1:
            raise ValueError(
                "Reversible: damping=1 was given, but a number below 1 is expected, since a step "
                "is undone by a division by 1 - damping; take jdeq.solvers.Picard() for the plain "
                "iteration."
            )

    def init(self, z: PyTree) -> PyTree:
        """The other state, which starts where the first one does."""
        return jax.tree.map(jnp.asarray, z)

    def step(self, z: PyTree, fz: PyTree, memory: PyTree, k: Array) -> tuple[PyTree, PyTree]:
        """``(1 - damping) memory + damping fz``, and ``z`` for the next memory."""
        del k
        return _tree.relax(memory, fz, self.damping), z
