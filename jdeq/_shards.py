"""What ``jax.shard_map`` asks of loops and of rules of differentiation: arrays that vary alike.

Inside it JAX knows of every array over which axes of the mesh it may vary. What a loop starts from
must vary as what it becomes does, but zeros vary over none; and the cotangent of an argument must
vary as the argument does, but that of shared parameters is a different one on every device, and
becomes the same by a sum, which is what JAX makes of the cast's transpose.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array, lax

PyTree = Any


def vary_alike(tree: PyTree) -> PyTree:
    """The tree with every array declared to vary over all axes over which any of them varies."""
    leaves, structure = jax.tree.flatten(tree)
    axes = [_varying_axes(leaf) for leaf in leaves]
    union = frozenset().union(*axes)
    cast = [_declare(leaf, union - own) for leaf, own in zip(leaves, axes, strict=True)]
    return jax.tree.unflatten(structure, cast)


def _varying_axes(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _declare(array: Array, axes: frozenset[str]) -> Array:
    return lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array
