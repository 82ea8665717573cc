"""Accuracy that follows the training: how many iterations the inner solves of a step get.

A gradient through inner solves that are cut short is off by what their residuals measure
(`jdeq.joint.hypergradient_error`), and early in a training a rough one may do. The error that is
allowed falls geometrically over the training,

    allowed(step) = first^(1 - t) last^t,      t = step / (steps - 1),

and after every step the number of iterations grows by a twentieth where the median of the batch's
estimated errors exceeds it, and shrinks by as much where it does not: some tens of steps after a
change it has found the number at which they are equal. Medians, because there are always images
whose solve is far from its end, whatever it costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jdeq.joint import hypergradient_error
from jdeq.solution import Solution

_CHANGE = 1.05
"""Factor by which the number of iterations changes from a step to the next."""

_WORST = 1.0
"""Relative error from which on a gradient says nothing: failed solves have this one, too."""


@dataclass(frozen=True)
class AccuracyControl:
    """A controller of the iterations of the inner solves, whose state is one number.

    Attributes:
        first: Relative error of the gradient that is allowed at the first step, in (0, 1).
        last: At the last, in (0, `first`].
        least: Fewest iterations, at least 1.
        most: Most iterations, with which training starts, at least `least`.
        steps: Training steps in all.

    Raises:
        ValueError: A number is out of range.
    """

    first: float
    last: float
    least: int
    most: int
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.last <= self.first < 1:
            raise ValueError(
                f"errors from {self.first!r} at the first step to {self.last!r} at the last are to "
                "be allowed, but numbers between 0 and 1 are expected that do not grow; give the "
                "looser one first, (0.3, 0.1) say."
            )
        if not 1 <= self.least <= self.most:
            raise ValueError(
                f"at least {self.least!r} and at most {self.most!r} inner iterations were given, "
                "but a range of at least 1 is expected; lower the least number or raise the most."
            )

    def start(self) -> Array:
        """The state at the first step, a float32 scalar."""
        return jnp.asarray(self.most, jnp.float32)

    def iterations(self, state: Array) -> Array:
        """The iterations of a step, an int32 scalar."""
        return jnp.round(state).astype(jnp.int32)

    def allowed(self, step: Array) -> Array:
        """The relative error that is allowed in the step after `step` others."""
        done = step / max(1, self.steps - 1)
        return jnp.asarray(self.first * (self.last / self.first) ** done, jnp.float32)

    def adjusted(self, state: Array, errors: Array, step: Array) -> Array:
        """The next state, given what `estimated_errors` says of all examples of a step, [B]."""
        exceeds = jnp.median(errors) > self.allowed(step)
        moved = state * jnp.where(exceeds, _CHANGE, 1 / _CHANGE)
        return jnp.clip(moved, self.least, self.most).astype(state.dtype)


def estimated_errors(solution: Solution) -> Array:
    """Relative errors of the examples' envelope gradients as residuals estimate them, [B].

    Up to constants, see `jdeq.joint.hypergradient_error`; none is above 1.
    """
    return jnp.minimum(hypergradient_error(solution).envelope, _WORST)
