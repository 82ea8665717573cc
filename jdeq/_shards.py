"""Batches spread over devices: what JAX asks of loops and of rules of differentiation.

Inside ``jax.shard_map`` JAX knows of every array over which axes of the mesh it may vary. What a
loop starts from must vary as what it becomes does, but zeros vary over none; and the cotangent of
an argument must vary as the argument does, but that of shared parameters is a different one on
every device, and becomes the same by a sum, which is what JAX makes of the cast's transpose.

On a mesh with explicit axes, as ``jax.make_mesh`` makes it, an array's type says how it is spread,
and what a loop starts from must be spread as what it becomes is. There the compiler is asked to
find that out, as it does on other meshes, and is only told how the problems of a solution lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


def automatic(places: Callable[[PartitionSpec, PartitionSpec], PyTree]) -> Callable:
    """Decorates a solve for batches that are spread over explicit axes of a mesh.

    Args:
        places: ``places(first, second)`` says how the arrays lie that the solve returns, as a
            prefix of their tree: of ``first`` where the axis of problems is the first, of
            ``second`` where it is the second.

    Returns:
        The decorator of a function whose first argument is a tuple: parameters, then trees whose
        leaves have the problem axis first.
    """

    def decorate(solve: Callable) -> Callable:
        @functools.wraps(solve)
        def spread(arguments: tuple, *others: PyTree, **static: Any) -> PyTree:
            leaves = jax.tree.leaves((arguments, others))
            shardings = [jax.typeof(leaf).sharding for leaf in leaves]
            explicit = [s for s in shardings if is_spread(s)]
            if not explicit:
                return solve(arguments, *others, **static)
            mesh = explicit[0].mesh
            rows = _axes_of_problems(arguments[1:])
            return jax.sharding.auto_axes(
                functools.partial(solve, **static),
                out_sharding=jax.tree.map(
                    functools.partial(NamedSharding, mesh),
                    places(PartitionSpec(rows), PartitionSpec(None, rows)),
                ),
            )(arguments, *others)

        return spread

    return decorate


def is_spread(sharding: NamedSharding) -> bool:
    """Whether an array's type says that it is spread over explicit axes of a mesh."""
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return explicit and any(axes is not None for axes in sharding.spec)


def _axes_of_problems(tree: PyTree) -> Any:
    """The axes of the mesh over which the first axis of any leaf is spread; None for none."""
    for leaf in jax.tree.leaves(tree):
        spec = jax.typeof(leaf).sharding.spec
        if spec and spec[0] is not None:
            return spec[0]
    return None
