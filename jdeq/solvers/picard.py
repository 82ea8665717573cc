"""Damped Picard iteration."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from jdeq import _options, _tree

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Picard:
    """Damped Picard (Krasnoselskii-Mann) iteration ``z <- z + damping (f(z) - z)``.

    Converges linearly where ``(1 - damping) I + damping J`` has spectral radius below one; it costs
    nothing besides the evaluation.

    Attributes:
        damping: fraction of the way to ``f(z)``, in (0, 1]; 1 is the plain iteration.

    Raises:
        ValueError: if ``damping`` is outside (0, 1].
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        _options.check_fraction("Picard", "damping", self.damping)

    def init(self, z: PyTree) -> tuple[()]:
        """Picard remembers nothing."""
        del z
        return ()

    def step(self, z: PyTree, fz: PyTree, memory: tuple[()], k: Array) -> tuple[PyTree, tuple[()]]:
        """``z + damping (fz - z)``."""
        del k
        return _tree.relax(z, fz, self.damping), memory
