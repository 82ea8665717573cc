"""Windows of past vectors, kept leaf by leaf: every leaf ``[B, window, n]``.

A leaf ``[B, ...]`` of the vector is flat in its window, ``n`` entries a problem: were it not, XLA's
CPU backend would copy the whole window in every step of a loop, once a use.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _tree

PyTree = Any


def empty(z: PyTree, window: int) -> PyTree:
    """Zeros for ``window`` vectors like ``z``."""
    return jax.tree.map(lambda v: jnp.zeros((v.shape[0], window, _tree.entries(v)), v.dtype), z)


def write(windows: PyTree, new: PyTree, slot: Array) -> PyTree:
    """The windows with ``new`` in ``slot`` of every problem."""
    return jax.tree.map(
        lambda window, leaf: lax.dynamic_update_index_in_dim(window, _flat(leaf), slot, 1),
        windows,
        new,
    )


def read(windows: PyTree, slot: Array, like: PyTree) -> PyTree:
    """What ``slot`` holds, in the shapes of ``like``."""
    return jax.tree.map(
        lambda window, leaf: lax.dynamic_index_in_dim(window, slot, 1, False).reshape(leaf.shape),
        windows,
        like,
    )


def products(windows: PyTree, vectors: list[PyTree]) -> tuple[Array, ...]:
    """For each vector its products with every slot of the windows, ``[B, window]`` each.

    One product of a matrix and a vector a problem: on CPUs several vectors at once, a thin matrix,
    take XLA's slow path (eight times as long for two vectors, 48 problems, 10 slots of 23,520).
    """

    def leaf(window: Array, part: Array) -> Array:
        return jnp.einsum(
            "bmn,bn->bm",
            window,
            _flat(part),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=_tree.accumulation_dtype(window.dtype),
        )

    def total(vector: PyTree) -> Array:
        return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, windows, vector)))

    return tuple(total(vector) for vector in vectors)


def combine(windows: PyTree, weights: Array, like: PyTree) -> PyTree:
    """``sum_j weights[:, j] windows[:, j]``, leaf by leaf, in the shapes of ``like``."""

    def leaf(window: Array, shaped: Array) -> Array:
        return jnp.einsum(
            "bm,bmn->bn",
            weights.astype(window.dtype),
            window,
            precision=lax.Precision.HIGHEST,
        ).reshape(shaped.shape)

    return jax.tree.map(leaf, windows, like)


def _flat(leaf: Array) -> Array:
    return leaf.reshape(leaf.shape[0], _tree.entries(leaf))
