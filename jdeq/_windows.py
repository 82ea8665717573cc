"""Windows of past vectors, kept leaf by leaf: every leaf ``[B, window, ...]``."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _tree

PyTree = Any


def empty(z: PyTree, window: int) -> PyTree:
    """Zeros for ``window`` vectors like ``z``."""

    def leaf(v: Array) -> Array:
        return jnp.zeros((v.shape[0], window, *v.shape[1:]), v.dtype)

    return jax.tree.map(leaf, z)


def write(windows: PyTree, new: PyTree, slot: Array) -> PyTree:
    """The windows with ``new`` in ``slot`` of every problem."""
    return jax.tree.map(
        lambda window, leaf: lax.dynamic_update_index_in_dim(window, leaf, slot, 1), windows, new
    )


def products(windows: PyTree, vectors: list[PyTree]) -> tuple[Array, ...]:
    """For each vector its products with every slot of the windows, ``[B, window]`` each."""

    def leaf(window: Array, *parts: Array) -> Array:
        dtype = _tree.accumulation_dtype(window.dtype)
        shape = (*window.shape[:2], math.prod(window.shape[2:]))
        stacked = jnp.stack([p.reshape(shape[0], shape[2]) for p in parts], axis=1)
        return jnp.einsum(
            "bmn,bvn->vbm",
            window.reshape(shape),
            stacked,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )

    parts: list[Array] = jax.tree.leaves(jax.tree.map(leaf, windows, *vectors))
    total: Array = functools.reduce(jnp.add, parts)
    return tuple(total)


def combine(windows: PyTree, weights: Array) -> PyTree:
    """``sum_j weights[:, j] windows[:, j]``, leaf by leaf."""

    def leaf(window: Array) -> Array:
        return jnp.einsum(
            "bm,bmn->bn",
            weights.astype(window.dtype),
            window.reshape(*window.shape[:2], math.prod(window.shape[2:])),
            precision=lax.Precision.HIGHEST,
        ).reshape(window.shape[0], *window.shape[2:])

    return jax.tree.map(leaf, windows)
