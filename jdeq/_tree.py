"""Per-problem arithmetic on pytrees whose every leaf has the problem axis first."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq._shards import vary_alike

PyTree = Any


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which sums over a leaf of ``dtype`` are taken: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def problem_count(tree: PyTree) -> int:
    """Size B of the problem axis, read from the first leaf."""
    return jax.tree.leaves(tree)[0].shape[0]


def entries(leaf: Array) -> int:
    """How many numbers of ``leaf`` each problem has."""
    return math.prod(leaf.shape[1:])


def dot(a: PyTree, b: PyTree) -> Array:
    """Inner product of two pytrees, one number a problem ``[B]``."""

    def leaf(u: Array, v: Array) -> Array:
        dtype = accumulation_dtype(u.dtype)
        product = u.astype(dtype) * v.astype(dtype)
        return jnp.sum(product.reshape(product.shape[0], -1), axis=1)

    parts = jax.tree.leaves(jax.tree.map(leaf, a, b))
    return functools.reduce(jnp.add, parts)


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves, one number a problem ``[B]``."""
    return jnp.sqrt(dot(tree, tree))


def in_range(tree: PyTree) -> tuple[Array, PyTree]:
    """``(unit, tree / unit)``, whose norm neither overflows nor underflows.

    ``unit [B]`` is the power of two nearest to each problem's largest entry, so that no digit is
    lost, and one where that is zero or not finite.
    """

    def leaf(v: Array) -> Array:
        size = jnp.abs(v.reshape(v.shape[0], -1)).astype(accumulation_dtype(v.dtype))
        return jnp.max(size, axis=1, initial=0)

    largest = functools.reduce(jnp.maximum, map(leaf, jax.tree.leaves(jax.lax.stop_gradient(tree))))
    largest = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    # The reciprocal of a larger unit would be a subnormal number, which XLA takes for zero.
    info = jnp.finfo(largest.dtype)
    unit = jnp.minimum(jax.lax.reduce_precision(largest, info.nexp, 0), 1 / info.tiny)
    return unit, scale(1 / unit, tree)


def expand(mask: Array, leaf: Array) -> Array:
    """``mask [B]`` with trailing axes of size one, to broadcast against ``leaf``."""
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - 1))


def select(mask: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Per problem, ``on_true`` where ``mask [B]`` holds, else ``on_false``."""
    return jax.tree.map(lambda t, f: jnp.where(expand(mask, t), t, f), on_true, on_false)


def scale(factor: Array, tree: PyTree) -> PyTree:
    """Each problem's leaves times its entry of ``factor [B]``, rounded once, dtypes kept."""
    return jax.tree.map(lambda v: (expand(factor, v) * v).astype(v.dtype), tree)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """``a - b``, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def add(a: PyTree, b: PyTree) -> PyTree:
    """``a + b``, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def relax(old: PyTree, new: PyTree, amount: float) -> PyTree:
    """``old + amount (new - old)``, leaf by leaf; ``amount == 1`` returns ``new`` itself."""
    if amount == 1:
        return new
    return jax.tree.map(lambda o, n: o + jnp.asarray(amount, o.dtype) * (n - o), old, new)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the same structure, shapes and dtypes."""
    return jax.tree.map(jnp.zeros_like, tree)


def cast_like(tree: PyTree, other: PyTree) -> PyTree:
    """``tree`` with the dtypes of ``other``, leaf by leaf."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, other)


def join(tree: PyTree) -> Array:
    """The leaves of each problem side by side, ``[B, n]``, in their common dtype."""
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(*leaves)
    flat = [leaf.reshape(leaf.shape[0], entries(leaf)).astype(dtype) for leaf in leaves]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)


def split_like(joined: Array, other: PyTree) -> PyTree:
    """The tree like ``other`` whose ``join`` is given."""
    leaves, structure = jax.tree.flatten(other)
    ends = itertools.accumulate(entries(leaf) for leaf in leaves[:-1])
    parts = jnp.split(joined, list(ends), axis=1)
    shaped = [p.reshape(v.shape).astype(v.dtype) for p, v in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def normal_like(key: Array, tree: PyTree) -> PyTree:
    """Standard normal numbers in the structure, shapes and dtypes of ``tree``."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, vary_alike((drawn, leaves))[0])
