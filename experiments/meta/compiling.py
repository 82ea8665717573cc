"""Several programs compiled at once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax


def compile_together(lowered: Iterable[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
    """The compiled programs, in order; XLA spends most of a compilation on one core."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(jax.stages.Lowered.compile, lowered))
