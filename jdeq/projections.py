"""Euclidean projections on the constraint sets of input problems, one problem a batch element.

Thin names over ``optax.projections``, mapped over the problem axis, and intersections with a box.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from optax import projections

from jdeq import _tree
from jdeq._shards import vary_alike

PyTree = Any


def l2_ball(x: PyTree, radius: Array) -> PyTree:
    """The nearest point to each problem's ``x`` with ``||x||_2 <= radius``.

    Args:
        x: every leaf ``[B, ...]``; the norm runs over all leaves of a problem.
        radius: at least 0, one a problem ``[B]``.

    Returns:
        The projection, like ``x``.
    """
    unit, v = _tree.in_range(x)
    square, radius = _tree.dot(v, v), radius / unit
    inside = square <= radius**2
    # Inside, no norm is taken: that of zero has no derivative.
    norm = jnp.sqrt(jnp.where(inside, 1, square))
    return _tree.scale(jnp.where(inside, 1, radius / norm), x)


def linf_ball(x: PyTree, radius: Array) -> PyTree:
    """The nearest point to each problem's ``x`` with ``max |x| <= radius``.

    Args:
        x: every leaf ``[B, ...]``.
        radius: at least 0, one a problem ``[B]``.

    Returns:
        The projection, like ``x``.
    """
    return jax.vmap(projections.projection_linf_ball)(x, radius)


def box(x: PyTree, lower: Any, upper: Any) -> PyTree:
    """``x`` clipped to ``[lower, upper]``.

    Args:
        x: any pytree.
        lower: lower bounds, scalar or like ``x``.
        upper: upper bounds, scalar or like ``x``.

    Returns:
        The projection, like ``x``.
    """
    return projections.projection_box(x, _like(lower, x), _like(upper, x))


def simplex(x: Array, scale: float = 1.0) -> Array:
    """The nearest point to each problem's ``x`` with non-negative entries that sum to ``scale``.

    Args:
        x: ``[B, n]``.
        scale: above 0.

    Returns:
        The projection, ``[B, n]``.
    """
    # What all entries have in common does not move the projection, but would round its small ones.
    x -= lax.stop_gradient(jnp.max(x, axis=1, keepdims=True))
    return jax.vmap(lambda row: projections.projection_simplex(row, scale))(x).astype(x.dtype)


@jax.jit
def l2_ball_in_box(x: PyTree, radius: Array, lower: Any, upper: Any) -> PyTree:
    """The nearest point to each problem's ``x`` with ``||x||_2 <= radius`` in ``[lower, upper]``.

    For perturbations of an image in [0, 1]: ``lower = -image``, ``upper = 1 - image``.

    The point is ``clip(t x, lower, upper)``, where ``t = 1 / (1 + lambda)`` and lambda is the
    multiplier of the norm. Its squared norm is a concave, piecewise linear function of ``t^2``, so
    that Newton's method from 0 rises to the root and hits it exactly. Slope times distance falls at
    least fourfold a step: it takes few, each a sum over x. Derivatives of any order are exact
    wherever the projection has one.

    Args:
        x: every leaf ``[B, ...]``; the norm runs over all leaves of a problem.
        radius: at least 0, one a problem ``[B]``.
        lower: lower bounds, at most 0: a scalar, or like ``x``.
        upper: upper bounds, at least 0: a scalar, or like ``x``.

    Returns:
        The projection, like ``x``; NaN for a problem whose bounds do not hold 0 between them.
    """
    lower, upper = _like(lower, x), _like(upper, x)
    clipped = box(x, lower, upper)
    # How far each entry may go in the direction that it points in.
    room = jax.tree.map(lambda v, low, high: jnp.where(v < 0, -low, high), x, lower, upper)
    radius = jnp.asarray(radius, _tree.dot(x, x).dtype)
    square = radius**2
    inside = _tree.dot(clipped, clipped) <= square
    # The search needs no derivative: the last step is exact, given which bounds are active.
    level = _search_level(*lax.stop_gradient((x, room, square, inside)))
    used, free = _shares(x, room, level)
    usable = ~inside & (free > 0)
    # Safe values where no branch takes them: an infinite radius is no constraint.
    finite = jnp.where(usable, radius, 1)
    left = jnp.where(usable & (used > 0), finite**2 - used, 1)
    length = jnp.where(used > 0, jnp.sqrt(left), finite)
    factor = jnp.where(usable, length / jnp.sqrt(jnp.where(usable, free, 1)), 1)
    scaled = box(_tree.scale(factor, x), lower, upper)
    bounds = jax.tree.map(lambda low, high: (low <= 0) & (high >= 0), lower, upper)
    valid = functools.reduce(jnp.logical_and, map(_all_of_problem, jax.tree.leaves(bounds)))
    valid &= square >= 0
    return _tree.scale(jnp.where(valid, 1, jnp.nan), _tree.select(inside, clipped, scaled))


def linf_ball_in_box(x: PyTree, radius: Array, lower: Any, upper: Any) -> PyTree:
    """The nearest point to each problem's ``x`` with ``max |x| <= radius`` in ``[lower, upper]``.

    Args:
        x: every leaf ``[B, ...]``.
        radius: at least 0, one a problem ``[B]``.
        lower: lower bounds, at most 0: a scalar, or like ``x``.
        upper: upper bounds, at least 0: a scalar, or like ``x``.

    Returns:
        The projection, like ``x``.
    """

    def clip(leaf: Array, low: Array, high: Array) -> Array:
        limit = _tree.expand(radius, leaf).astype(leaf.dtype)
        return jnp.clip(leaf, jnp.maximum(low, -limit), jnp.minimum(high, limit))

    return jax.tree.map(clip, x, _like(lower, x), _like(upper, x))


_MOST_NEWTON_STEPS = 100
"""More than any problem takes: each step gains at least a factor of four."""


def _search_level(x: PyTree, room: PyTree, square: Array, inside: Array) -> Array:
    """``t^2 [B]`` with ``||clip(t x)||^2 = square``, 0 for the problems that are ``inside``."""

    def rising(carry: tuple[Array, Array, Array]) -> Array:
        step, _, active = carry
        return (step < _MOST_NEWTON_STEPS) & jnp.any(active)

    def rise(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, level, active = carry
        used, free = _shares(x, room, level)
        newton = (square - used) / jnp.where(free > 0, free, 1)
        active &= (free > 0) & (newton > level)
        return step + 1, jnp.where(active, newton, level), active

    start = (jnp.zeros((), jnp.int32), jnp.zeros_like(square), ~inside)
    return lax.while_loop(rising, rise, vary_alike(start))[1]


def _shares(x: PyTree, room: PyTree, level: Array) -> tuple[Array, Array]:
    """Squared norms of the room where ``sqrt(level) x`` fills it, and of x elsewhere."""
    factor = jnp.sqrt(level)
    full = jax.tree.map(
        lambda v, r: _tree.expand(factor, v).astype(v.dtype) * jnp.abs(v) >= r, x, room
    )
    used = jax.tree.map(lambda full, r: jnp.where(full, r, 0), full, room)
    free = jax.tree.map(lambda full, v: jnp.where(full, 0, v), full, x)
    return _tree.dot(used, used), _tree.dot(free, free)


def _like(bound: Any, x: PyTree) -> PyTree:
    """The bound in the structure, shapes and dtypes of ``x``."""
    structure: Any = jax.tree.structure(x)
    if structure != jax.tree.structure(bound):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, bound), x)
    return jax.tree.map(
        lambda leaf, b: jnp.broadcast_to(jnp.asarray(b, leaf.dtype), leaf.shape), x, bound
    )


def _all_of_problem(leaf: Array) -> Array:
    return jnp.all(leaf.reshape(leaf.shape[0], -1), axis=1)
