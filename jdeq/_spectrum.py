"""Eigenvalues of linear maps from their products alone, one map a problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _tree
from jdeq._shards import vary_alike

PyTree = Any

_SQUARINGS = 24
"""Gelfand's formula is off by the 2^24-th root of the condition number of the eigenvectors."""

_POWERS = 2
"""Steps of power iteration before the Krylov space, in dimensions of that."""

_ROUNDING = 100
"""What is left of a vector after Gram-Schmidt is rounding below this many units of it..."""

_MOST_ROUNDING = 0.01
"""...and below this share of it at most: in bfloat16, whole vectors have fewer units than that."""


class _Arnoldi(NamedTuple):
    """An orthonormal Krylov basis ``[B, m + 1, n]``, and ``V^T A V``, ``[B, m, m]``.

    ``used`` counts the basis vectors that are not zero, int32 ``[B]``.
    """

    basis: Array
    projected: Array
    used: Array


def spectral_radius(matvec: Callable[[PyTree], PyTree], start: PyTree, *, dimension: int) -> Array:
    """The largest modulus of the eigenvalues of A, by Arnoldi's method after power iteration.

    Exact once the Krylov space is the whole space; before, the eigenvalues of largest modulus are
    the first to settle, complex pairs included, on which power iteration alone does not. Where A is
    far from normal the estimate may be too large; power iteration makes that rarer.

    Args:
        matvec: ``A`` applied to a pytree like ``start``; linear, independent across problems.
        start: first vector, usually random, every leaf ``[B, ...]``.
        dimension: largest dimension of the Krylov space, at least 1. It takes three times as many
            products.

    Returns:
        One estimate a problem, ``[B]``.
    """

    def power(_: Array, v: PyTree) -> PyTree:
        return _normalised(matvec(v))

    start = lax.fori_loop(0, _POWERS * dimension, power, _normalised(start))
    return _radius(_arnoldi(matvec, start, dimension).projected)


def relaxed_radii(
    matvec: Callable[[PyTree], PyTree],
    start: PyTree,
    relaxations: Sequence[float],
    *,
    dimension: int,
) -> Array:
    """The spectral radius of ``(1 - w) I + w A`` for every w, by Arnoldi's method.

    Args:
        matvec: ``A`` applied to a pytree like ``start``; linear, independent across problems.
        start: first vector, usually random, every leaf ``[B, ...]``.
        relaxations: the ``w``.
        dimension: largest dimension of the Krylov space, at least 1: the products it takes.

    Returns:
        ``[len(relaxations), B]``. Lower bounds until the Krylov space is the whole space: the
        eigenvalues at the rim of the spectrum are found first, and these decide.
    """
    found = _arnoldi(matvec, start, dimension)
    identity = jnp.eye(dimension, dtype=found.projected.dtype)
    # Rows of vectors that the space has no room for have no eigenvalue of their own to add.
    room = jnp.arange(dimension) < found.used[:, None]
    identity = identity * room[:, :, None]
    return jnp.stack([_radius((1 - w) * identity + w * found.projected) for w in relaxations])


def _radius(matrix: Array) -> Array:
    """The largest modulus of the eigenvalues of small matrices ``[B, m, m]``, ``[B]``."""

    def square(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, log = carry
        size = jnp.sqrt(jnp.sum(matrix**2, axis=(1, 2)))
        matrix = matrix / jnp.where(size > 0, size, 1)[:, None, None]
        log += jnp.log(size) / 2.0**k
        return jnp.matmul(matrix, matrix, precision=lax.Precision.HIGHEST), log

    # Gelfand: ||A^n||^(1/n) tends to the radius. It needs no eigenvalue solver, which accelerators
    # lack for matrices that are not symmetric.
    zeros = jnp.zeros(matrix.shape[0], matrix.dtype)
    return jnp.exp(lax.fori_loop(0, _SQUARINGS, square, vary_alike((matrix, zeros)))[1])


def extreme_eigenvalues(
    matvec: Callable[[PyTree], PyTree], start: PyTree, *, dimension: int
) -> tuple[Array, Array]:
    """The smallest and the largest eigenvalue of a symmetric A, by Lanczos' method.

    The basis is kept orthogonal at full cost. Exact once the Krylov space is the whole space;
    before, the range is approached from inside.

    Args:
        matvec: ``A`` applied to a pytree like ``start``; linear, independent across problems.
        start: first vector, usually random, every leaf ``[B, ...]``.
        dimension: largest dimension of the Krylov space, at least 1: the products it takes.

    Returns:
        Both, ``[B]`` each.
    """
    found = _arnoldi(matvec, start, dimension)
    matrix = (found.projected + found.projected.swapaxes(1, 2)) / 2
    # Rows of vectors that the space has no room for: any number within the range will do.
    filler = jnp.where(jnp.arange(dimension) < found.used[:, None], 0, matrix[:, :1, 0])
    eigenvalues = jnp.linalg.eigvalsh(
        matrix + filler[:, :, None] * jnp.eye(dimension, dtype=matrix.dtype)
    )
    return eigenvalues[:, 0], eigenvalues[:, -1]


def _normalised(v: PyTree) -> PyTree:
    size = _tree.norm(v)
    return _tree.scale(1 / jnp.where(size > 0, size, 1), v)


def _arnoldi(matvec: Callable[[PyTree], PyTree], start: PyTree, dimension: int) -> _Arnoldi:
    first = _rows(_normalised(start))
    count, eps = first.shape[0], jnp.finfo(first.dtype).eps
    for leaf in jax.tree.leaves(start):
        eps = max(eps, jnp.finfo(leaf.dtype).eps)
    rounding = min(_ROUNDING * float(eps), _MOST_ROUNDING)
    basis = jnp.zeros((count, dimension + 1, first.shape[1]), first.dtype).at[:, 0].set(first)
    projected = jnp.zeros((count, dimension, dimension), first.dtype)
    used = jnp.any(first != 0, axis=1).astype(jnp.int32)

    def extend(j: Array, state: _Arnoldi) -> _Arnoldi:
        w = _rows(matvec(_tree.split_like(state.basis[:, j], start)))
        whole = jnp.linalg.norm(w, axis=1)
        column = jnp.zeros((count, dimension + 1), w.dtype)
        for _ in range(2):
            along = jnp.einsum("bmn,bn->bm", state.basis, w, precision=lax.Precision.HIGHEST)
            w -= jnp.einsum("bmn,bm->bn", state.basis, along, precision=lax.Precision.HIGHEST)
            column += along
        length = jnp.linalg.norm(w, axis=1)
        alive = length > rounding * whole
        column = column.at[:, j + 1].set(jnp.where(alive, length, 0))
        w *= jnp.where(alive, 1 / jnp.where(alive, length, 1), 0)[:, None]
        return _Arnoldi(
            basis=state.basis.at[:, j + 1].set(w),
            projected=state.projected.at[:, :, j].set(column[:, :dimension]),
            used=state.used + alive,
        )

    start_from = vary_alike(_Arnoldi(basis, projected, used))
    return lax.fori_loop(0, dimension, extend, start_from)


def _rows(tree: PyTree) -> Array:
    """All numbers of each problem in a row, ``[B, n]``, in the dtype of their inner products."""
    rows = _tree.join(tree)
    return rows.astype(_tree.accumulation_dtype(rows.dtype))
