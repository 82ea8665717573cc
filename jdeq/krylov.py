"""Krylov methods for linear systems, one system a problem, without matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jdeq import _tree, _windows
from jdeq._shards import vary_alike

PyTree = Any


class _Arnoldi(NamedTuple):
    """An orthonormal Krylov basis and the triangular factor of its Hessenberg matrix.

    Attributes:
        j: number of basis vectors multiplied so far, int32 scalar.
        basis: every leaf ``[B, m + 1, n]``; vectors not there yet are zero.
        triangle: ``[B, m, m]``, upper triangular.
        cosines: of the rotations that made it so, ``[B, m]``.
        sines: likewise.
        rhs: the rotated right-hand side, ``[B, m + 1]``; entry j is the residual after j steps.
        spent: matrix-vector products, int32 ``[B]``.
    """

    j: Array
    basis: PyTree
    triangle: Array
    cosines: Array
    sines: Array
    rhs: Array
    spent: Array


def gmres(
    matvec: Callable[[PyTree], PyTree], b: PyTree, *, dimension: int, rtol: float
) -> tuple[PyTree, Array]:
    """Approximates ``A u = b`` in a Krylov space, from ``u = 0`` (Saad and Schultz 1986).

    Every problem has its own space and stops on its own; what it returns does not depend on the
    others. Inner products run over all leaves of a problem.

    Args:
        matvec: ``A`` applied to a pytree like ``b``; linear, and independent across problems.
        b: right-hand side, every leaf ``[B, ...]``.
        dimension: largest dimension of the space, at least 1.
        rtol: a problem stops at ``||A u - b|| <= rtol ||b||``.

    Returns:
        ``u``, like ``b``, and the products with ``A`` that each problem took, int32 ``[B]``.
    """
    size = _tree.norm(b)
    shape = (size.shape[0], dimension)
    start = _Arnoldi(
        j=jnp.zeros((), jnp.int32),
        basis=_windows.write(
            _windows.empty(b, dimension + 1), _normalised(b, size), jnp.zeros((), jnp.int32)
        ),
        triangle=jnp.zeros((*shape, dimension), size.dtype),
        cosines=jnp.ones(shape, size.dtype),
        sines=jnp.zeros(shape, size.dtype),
        rhs=jnp.zeros((shape[0], dimension + 1), size.dtype).at[:, 0].set(size),
        spent=jnp.zeros(shape[:1], jnp.int32),
    )

    def active(state: _Arnoldi) -> Array:
        return jnp.abs(state.rhs[:, state.j]) > rtol * size

    def running(state: _Arnoldi) -> Array:
        return (state.j < dimension) & jnp.any(active(state))

    def extend(state: _Arnoldi) -> _Arnoldi:
        return _extend(matvec, state, active(state), b)

    state = lax.while_loop(running, extend, vary_alike(start))
    weights = _back_substitute(state.triangle, state.rhs[:, :dimension], state.j)
    last = jnp.zeros((shape[0], 1), weights.dtype)
    return _windows.combine(state.basis, jnp.concatenate([weights, last], axis=1), b), state.spent


def _extend(matvec: Callable, state: _Arnoldi, active: Array, like: PyTree) -> _Arnoldi:
    """One more basis vector, by Gram-Schmidt done twice, and one more column of the triangle."""
    j, dimension = state.j, state.cosines.shape[1]
    newest = _windows.read(state.basis, j, like)
    w = matvec(newest)
    column = jnp.zeros_like(state.rhs)
    for _ in range(2):
        (along,) = _windows.products(state.basis, [w])
        w = _tree.subtract(w, _windows.combine(state.basis, along, w))
        column += along
    length = _tree.norm(w)
    column = column.at[:, j + 1].set(length)
    column = jnp.where(active[:, None], column, 0)

    def rotate(i: Array, column: Array) -> Array:
        return _rotate(column, i, state.cosines[:, i], state.sines[:, i])

    column = lax.fori_loop(0, j, rotate, column)
    radius = jnp.hypot(column[:, j], column[:, j + 1])
    safe = jnp.where(radius > 0, radius, 1)
    cosine = jnp.where(radius > 0, column[:, j] / safe, 1)
    sine = jnp.where(radius > 0, column[:, j + 1] / safe, 0)
    column = _rotate(column, j, cosine, sine)
    # A problem that has stopped keeps its residual at entry j, and so stays stopped.
    moved = _rotate(state.rhs, j, cosine, sine)
    stopped = state.rhs.at[:, j + 1].set(state.rhs[:, j]).at[:, j].set(0)
    return _Arnoldi(
        j=j + 1,
        basis=_windows.write(state.basis, _normalised(w, jnp.where(active, length, 0)), j + 1),
        triangle=state.triangle.at[:, :, j].set(column[:, :dimension]),
        cosines=state.cosines.at[:, j].set(cosine),
        sines=state.sines.at[:, j].set(sine),
        rhs=jnp.where(active[:, None], moved, stopped),
        spent=state.spent + active,
    )


def _rotate(vector: Array, i: Array, cosine: Array, sine: Array) -> Array:
    """The Givens rotation of entries i and i + 1 of every row."""
    upper, lower = vector[:, i], vector[:, i + 1]
    vector = vector.at[:, i].set(cosine * upper + sine * lower)
    return vector.at[:, i + 1].set(cosine * lower - sine * upper)


def _normalised(w: PyTree, length: Array) -> PyTree:
    """``w / length``, zero where the length is."""
    return _tree.scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), w)


def _back_substitute(triangle: Array, rhs: Array, columns: Array) -> Array:
    """Weights of the basis vectors; zero where a column is empty."""
    dimension = rhs.shape[1]
    diagonal = jnp.diagonal(triangle, axis1=1, axis2=2)
    used = (diagonal != 0) & (jnp.arange(dimension) < columns)
    triangle += jnp.where(used, 0, 1)[:, :, None] * jnp.eye(dimension, dtype=triangle.dtype)
    rhs = jnp.where(used, rhs, 0)
    return lax.linalg.triangular_solve(triangle, rhs[:, :, None], left_side=True)[:, :, 0]


class _BiCGStab(NamedTuple):
    """Where the iteration stands; the names are van der Vorst's.

    Attributes:
        u: the iterate.
        r: its residual, as the recurrence has it.
        p: search direction.
        v: ``A p``.
        rho: ``shadow . r`` of the last iteration, ``[B]``.
        alpha: step along ``p``, ``[B]``.
        omega: step along the stabilising residual, ``[B]``.
        best: the iterate of least residual so far.
        least: norm of that residual, ``[B]``.
        going: problems that have neither converged nor broken down, bool ``[B]``.
        done: iterations so far, int32 scalar.
        spent: matrix-vector products, int32 ``[B]``.
    """

    u: PyTree
    r: PyTree
    p: PyTree
    v: PyTree
    rho: Array
    alpha: Array
    omega: Array
    best: PyTree
    least: Array
    going: Array
    done: Array
    spent: Array


def bicgstab(
    matvec: Callable[[PyTree], PyTree], b: PyTree, *, iterations: int, rtol: float
) -> tuple[PyTree, Array]:
    """Approximates ``A u = b`` by stabilised biconjugate gradients, from ``u = 0``.

    The method of van der Vorst (1992) with the right-hand side for shadow residual. Every problem
    has its own coefficients and stops on its own, also where a denominator of its own vanishes: it
    then has the best iterate it got to, from which the caller may start again.

    Args:
        matvec: ``A`` applied to a pytree like ``b``; linear, and independent across problems.
        b: right-hand side, every leaf ``[B, ...]``.
        iterations: limit on the iterations, of two products each.
        rtol: a problem stops at ``||A u - b|| <= rtol ||b||``, by the recurrence's residual.

    Returns:
        The iterate of least residual, like ``b``, and the products with ``A`` that each problem
        took, int32 ``[B]``.
    """
    size = _tree.norm(b)
    zeros, ones = _tree.zeros_like(b), jnp.ones_like(size)
    start = _BiCGStab(
        u=zeros,
        r=b,
        p=zeros,
        v=zeros,
        rho=ones,
        alpha=ones,
        omega=ones,
        best=zeros,
        least=size,
        going=size > 0,
        done=jnp.zeros((), jnp.int32),
        spent=jnp.zeros(size.shape, jnp.int32),
    )

    def running(state: _BiCGStab) -> Array:
        return (state.done < iterations) & jnp.any(state.going)

    def body(state: _BiCGStab) -> _BiCGStab:
        new = _iterate_bicgstab(matvec, b, state, rtol * size)
        kept = [_tree.select(state.going, *pair) for pair in zip(new, state, strict=True)]
        return _BiCGStab(*kept)._replace(done=state.done + 1)

    state = lax.while_loop(running, body, vary_alike(start))
    return state.best, state.spent


def _iterate_bicgstab(
    matvec: Callable, shadow: PyTree, state: _BiCGStab, tolerance: Array
) -> _BiCGStab:
    """One iteration of every problem, whether it is going or not."""
    unit = jnp.finfo(state.rho.dtype).eps
    shadow_size = _tree.norm(shadow)

    rho = _tree.dot(shadow, state.r)
    beta = _divide(rho, state.rho) * _divide(state.alpha, state.omega)
    back = _tree.subtract(state.p, _tree.scale(state.omega, state.v))
    p = _tree.add(state.r, _tree.scale(beta, back))
    v = matvec(p)
    curvature = _tree.dot(shadow, v)
    alpha = _divide(rho, curvature)
    s = _tree.subtract(state.r, _tree.scale(alpha, v))
    t = matvec(s)
    t_dot_s, t_dot_t = _tree.dot(t, s), _tree.dot(t, t)
    omega = _divide(t_dot_s, t_dot_t)
    u = _tree.add(state.u, _tree.add(_tree.scale(alpha, p), _tree.scale(omega, s)))
    r = _tree.subtract(s, _tree.scale(omega, t))

    least = _tree.norm(r)
    # Within rounding of zero, the next coefficients would be noise.
    sound = jnp.abs(rho) > unit * shadow_size * _tree.norm(state.r)
    sound &= jnp.abs(curvature) > unit * shadow_size * _tree.norm(v)
    sound &= jnp.abs(t_dot_s) > unit * _tree.norm(s) * jnp.sqrt(t_dot_t)
    better = least < state.least
    return _BiCGStab(
        u=u,
        r=r,
        p=p,
        v=v,
        rho=rho,
        alpha=alpha,
        omega=omega,
        best=_tree.select(better, u, state.best),
        least=jnp.where(better, least, state.least),
        going=sound & (least > tolerance),
        done=state.done,
        spent=state.spent + 2,
    )


def _divide(a: Array, b: Array) -> Array:
    """``a / b``, zero where ``b`` is."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)
