"""The reduced problem of a joint solve, linearised: its state follows its input."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _spectrum, _tree
from jdeq.joint.augmented import AugmentedState
from jdeq.joint.problem import PureProblem, Theta
from jdeq.joint.run import Given
from jdeq.krylov import gmres

PyTree = Any

_GMRES_DIMENSION = 40
_GMRES_RESTARTS = 5


class Range(NamedTuple):
    """Extreme eigenvalues, ``[B]`` each."""

    smallest: Array
    largest: Array


Product = Callable[[PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Reduced:
    """The linearisation at a point, where the state follows x.

    Attributes:
        state: ``df/dz``.
        state_transposed: its transpose.
        input: ``df/dx``.
        input_transposed: its transpose.
        curvature: Hessian of ``l + mu . f`` in (z, x), mu solving the adjoint equation.
        z: the state, for its shapes.
        x: the input, for its shapes.
        rtol: of the linear solves.
        adjoint_residual: of the solve for mu, ``[B]``.
    """

    state: Product
    state_transposed: Product
    input: Product
    input_transposed: Product
    curvature: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    z: PyTree
    x: PyTree
    rtol: float
    adjoint_residual: Array

    @classmethod
    def at(cls, pure: PureProblem, given: Given, at: AugmentedState, rtol: float) -> Reduced:
        """Linearises the problem at a point, and solves for its adjoint."""
        theta: Theta
        theta, target, rest = given

        def cell(z: PyTree, x: PyTree) -> PyTree:
            return pure.cell(theta, (x, *rest), z)

        def loss(z: PyTree, x: PyTree) -> Array:
            return jnp.sum(pure.objective(theta, z, x, target, rest))

        z, x = at.z, at.x
        _, by_state = jax.linearize(lambda z: cell(z, x), z)
        _, by_input = jax.linearize(lambda x: cell(z, x), x)
        _, pull_state = jax.vjp(lambda z: cell(z, x), z)
        _, pull_input = jax.vjp(lambda x: cell(z, x), x)
        slope = jax.grad(loss)(z, x)
        mu, residual = _solve(lambda v: pull_state(v)[0], slope, rtol)

        def lagrangian(z: PyTree, x: PyTree) -> Array:
            return loss(z, x) + jnp.sum(_tree.dot(mu, cell(z, x)))

        _, curvature = jax.linearize(jax.grad(lagrangian, (0, 1)), z, x)
        return cls(
            state=by_state,
            state_transposed=lambda v: pull_state(v)[0],
            input=by_input,
            input_transposed=lambda v: pull_input(v)[0],
            curvature=curvature,
            z=z,
            x=x,
            rtol=rtol,
            adjoint_residual=residual,
        )

    def follow(self, v: PyTree) -> PyTree:
        """``J v``."""
        return _solve(self.state, self.input(v), self.rtol)[0]

    def pull(self, v: PyTree) -> PyTree:
        """``J^T v``."""
        return self.input_transposed(_solve(self.state_transposed, v, self.rtol)[0])

    def hessian_range(self, key: Array, dimension: int) -> Range:
        """Of the Hessian of the reduced objective, ``(J, I)^T curvature (J, I)``."""

        def product(v: PyTree) -> PyTree:
            by_z, by_x = self.curvature(self.follow(v), v)
            return _tree.add(self.pull(by_z), by_x)

        return _range(product, self.x, key, dimension)

    def kernel_range(self, key: Array, dimension: int) -> Range:
        """Of ``J^T J`` or ``J J^T``, whichever is smaller."""
        if _size(self.x) <= _size(self.z):
            return _range(lambda v: self.pull(self.follow(v)), self.x, key, dimension)
        return _range(lambda u: self.follow(self.pull(u)), self.z, key, dimension)


def _range(product: Product, like: PyTree, key: Array, dimension: int) -> Range:
    start = _tree.normal_like(key, like)
    dimension = min(dimension, _size(like))
    return Range(*_spectrum.extreme_eigenvalues(product, start, dimension=dimension))


def _solve(linear: Product, b: PyTree, rtol: float) -> tuple[PyTree, Array]:
    """``u = linear(u) + b`` by restarted GMRES, and its residual over ``||b||``, ``[B]``."""
    size = _tree.norm(b)
    eps = jnp.finfo(size.dtype).eps
    tolerance = jnp.maximum(rtol, 10 * eps)

    def residual(u: PyTree) -> PyTree:
        return _tree.add(_tree.subtract(linear(u), u), b)

    def restart(carry: tuple[Array, PyTree, PyTree]) -> tuple[Array, PyTree, PyTree]:
        k, u, r = carry
        # A problem that is done has no residual left to reduce, and keeps its solution.
        open_ = _tree.norm(r) > tolerance * size
        r = _tree.select(open_, r, _tree.zeros_like(r))
        left = _tree.norm(r)
        fraction: Any = tolerance * size / jnp.where(left > 0, left, 1)
        step, _ = gmres(
            lambda v: _tree.subtract(v, linear(v)), r, dimension=_GMRES_DIMENSION, rtol=fraction / 2
        )
        u = _tree.add(u, step)
        return k + 1, u, residual(u)

    def running(carry: tuple[Array, PyTree, PyTree]) -> Array:
        k, _, r = carry
        return (k < _GMRES_RESTARTS) & jnp.any(_tree.norm(r) > tolerance * size)

    start = (jnp.zeros((), jnp.int32), _tree.zeros_like(b), b)
    _, u, r = lax.while_loop(running, restart, start)
    return u, relative(r, b)


def _size(tree: PyTree) -> int:
    """Numbers a problem."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(tree))


def relative(difference: PyTree, reference: PyTree) -> Array:
    """``||difference|| / ||reference||``, the latter one where it is zero, ``[B]``."""
    size = _tree.norm(reference)
    return _tree.norm(difference) / jnp.where(size > 0, size, 1)


def ratio(largest: Array, smallest: Array) -> Array:
    """``largest / smallest``, infinite where the smaller is not positive beyond rounding."""
    eps = jnp.finfo(largest.dtype).eps
    positive = smallest > 10 * eps * jnp.abs(largest)
    ratio = jnp.where(positive, largest / jnp.where(positive, smallest, 1), jnp.inf)
    return jnp.where(jnp.isnan(smallest), jnp.nan, ratio)
