"""Euclidean projections on the constraint sets of input problems, one problem a batch element.

Mostly thin names over ``optax.projections``, mapped over the problem axis.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from optax import projections

from jdeq import _tree

PyTree = Any


def l2_ball(x: PyTree, radius: Array) -> PyTree:
    """The nearest point to each problem's ``x`` with ``||x||_2 <= radius``.

    Args:
        x: every leaf ``[B, ...]``; the norm runs over all leaves of a problem.
        radius: at least 0, one a problem ``[B]``.

    Returns:
        The projection, like ``x``.
    """
    square = _tree.dot(x, x)
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
    return projections.projection_box(x, lower, upper)


def simplex(x: Array, scale: float = 1.0) -> Array:
    """The nearest point to each problem's ``x`` with non-negative entries that sum to ``scale``.

    Args:
        x: ``[B, n]``.
        scale: above 0.

    Returns:
        The projection, ``[B, n]``.
    """
    return jax.vmap(lambda row: projections.projection_simplex(row, scale))(x).astype(x.dtype)
