"""The options of a backward solve, which several gradients share."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from jdeq import _options
from jdeq.equilibrium import Controls, RunOptions
from jdeq.solvers.base import Solver


@dataclasses.dataclass(frozen=True)
class BackwardOptions:
    """How the linear equation behind a gradient is solved; None is what the forward solve has.

    Attributes:
        solver: its solver. Besides every fixed-point solver this may be one for affine maps,
            ``jdeq.solvers.GMRES()`` or ``BiCGStab()``, which need no contraction;
            ``jdeq.solvers.Picard()`` is the Neumann series.
        rtol: its relative tolerance, at least 0.
        atol: its absolute tolerance, at least 0, as a fraction of the norm of the right-hand side,
            so that a small loss is differentiated as precisely as a large one.
        max_steps: its step limit, at least 1; None is the forward one, the step budget included.
            The first step measures the start, which is the right-hand side: with a limit of 1 no
            equation is solved, and one cycle of ``GMRES()`` takes 2.

    Raises:
        TypeError: if ``solver`` is not a solver.
        ValueError: if a tolerance is negative or ``max_steps`` below 1.
    """

    solver: Solver | None = None
    rtol: float | None = None
    atol: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.solver is not None:
            _options.check_instance(owner, "solver", self.solver, Solver, "jdeq.solvers.Anderson()")
        if self.rtol is not None:
            _options.check_nonnegative(owner, "rtol", self.rtol)
        if self.atol is not None:
            _options.check_nonnegative(owner, "atol", self.atol)
        if self.max_steps is not None:
            _options.check_count(owner, "max_steps", self.max_steps)

    def controls(self, forward: Controls, size: Array) -> Controls:
        """Tolerances and budget for right-hand sides of norm ``size [B]``."""
        atol = forward.atol if self.atol is None else self.atol
        return Controls(
            rtol=forward.rtol if self.rtol is None else self.rtol,
            atol=jnp.asarray(atol) * size,
            budget=forward.budget if self.max_steps is None else None,
        )

    def run_options(self, forward: RunOptions) -> RunOptions:
        """Solver and step limit, and the forward solve's compaction."""
        return RunOptions(
            self.solver or forward.solver,
            self.max_steps or forward.max_steps,
            compaction=forward.compaction,
        )
