"""The optimiser of inputs that the tasks share."""

from __future__ import annotations

from functools import cache

import optax

_LAST_STEP = 0.02  # share of the first step that is left at the end


@cache
def cosine_adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with the short memory that suits tens of steps; cached: optax compares by identity."""
    schedule = optax.cosine_decay_schedule(rate, steps, _LAST_STEP)
    return optax.adam(schedule, b1=0.5, b2=0.9, eps=1e-20)
