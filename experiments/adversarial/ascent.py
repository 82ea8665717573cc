"""Steps on a perturbation: along the steepest direction, with momentum.

As optax transformations, so that the joint attack and PGD take the same ones.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from experiments.adversarial.problem import Norm

_LAST_RATE = 0.1


class _Memory(NamedTuple):
    """What momentum remembers of a problem.

    Attributes:
        steps: steps so far, int32.
        point: where the last step led, before its momentum and its projection.
    """

    steps: Array
    point: Array


def steepest(gradient: Array, norm: Norm) -> Array:
    """The steepest direction of length one of a problem; zero where the gradient is.

    `g / ||g||` under the l2 norm, `sign(g)` under the linf norm. Gradients may be so small that
    their squares underflow: those of a model that is sure of an image are.
    """
    if norm == "linf":
        return jnp.sign(gradient)
    largest = jnp.max(jnp.abs(gradient))
    scaled = gradient / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(scaled**2))
    return scaled / jnp.where(length > 0, length, 1)


@lru_cache
def ascent(
    norm: Norm, rate: float, *, decay_steps: int = 0, momentum: float = 0.0, hold: int = 0
) -> optax.GradientTransformation:
    """Projected steps along the steepest direction d, with Polyak's momentum of the points.

        v_k = u_k - rate_k d_k,      u_{k+1} = P(v_k + momentum (v_k - v_{k-1}))

    The points v lie outside of the set. On its sphere steps are so long that they hardly depend on
    u, as in a power iteration, and converge as slowly as one where two directions are worth much
    the same; momentum makes up for that.

    Args:
        norm: which direction is steepest.
        rate: length of the first step.
        decay_steps: steps over which the rate falls along a cosine to a tenth, where it stays;
            0 keeps it constant.
        momentum: in [0, 1).
        hold: steps at the beginning that leave u where it is. The first gradients of a joint solve
            are those of a state that has not settled, and a long step along one of them may lead
            to a lower maximum than a later one would.

    Returns:
        One object for each set of arguments: optax's transformations compare by identity.
    """
    schedule = optax.constant_schedule(rate)
    if decay_steps:
        schedule = optax.cosine_decay_schedule(rate, decay_steps, _LAST_RATE)

    def init(u: Array) -> _Memory:
        return _Memory(jnp.zeros((), jnp.int32), u)

    def update(gradient: Array, memory: _Memory, u: Array) -> tuple[Array, _Memory]:
        point = u - schedule(memory.steps) * steepest(gradient, norm)
        moving = memory.steps >= hold
        carried = jnp.where(memory.steps > hold, momentum, 0.0) * (point - memory.point)
        step = jnp.where(moving, point + carried - u, 0.0)
        return step, _Memory(memory.steps + 1, jnp.where(moving, point, u))

    return optax.GradientTransformation(init, update)
