"""Problems whose solutions are known as functions of their parameters and inputs.

The reference is a closed form where there is one, else two Newton steps with the dense Jacobian
from the solution held constant, whose first three derivatives are those of the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdeq.nn import MultiscaleCell

PyTree = Any

UNITS = 6
"""Entries of the state of a small problem."""


@dataclass(frozen=True, eq=False)
class Problem:
    """``z = cell(params, z, x)`` with its solution as a differentiable function.

    Attributes:
        cell: the cell.
        answer: ``answer(params, x) -> z*``.
        params: its parameters.
        x: its inputs.
        z0: the start.
    """

    cell: Callable[[PyTree, PyTree, PyTree], PyTree]
    answer: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    x: PyTree
    z0: PyTree


def linear() -> Problem:
    """``z = W z + U x``, a contraction of 0.8 that is not symmetric."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (UNITS, UNITS))
    params = {"w": 0.8 * w / jnp.linalg.norm(w, 2), "u": jax.random.normal(keys[1], (UNITS, 4))}

    def answer(params: PyTree, x: Array) -> Array:
        return jnp.linalg.solve(jnp.eye(UNITS) - params["w"], params["u"] @ x.T).T

    def cell(params: PyTree, z: Array, x: Array) -> Array:
        return z @ params["w"].T + x @ params["u"].T

    x = jax.random.normal(keys[2], (3, 4))
    return Problem(cell, answer, params, x, jnp.zeros((3, UNITS)))


def conditioned() -> Problem:
    """``z = rate z + shift``, the condition number ``1 / (1 - rate)`` from 1.1 to 1e4."""
    rate = 1 - 1 / jnp.array([1.1, 10.0, 1e2, 1e3, 1e4])[:, None]
    shift = jax.random.normal(jax.random.key(1), (5, UNITS))
    weights = jnp.array([0.5, 1.0, 0.9, 1.0, 0.5, 0.9])
    return Problem(
        lambda params, z, x: x["rate"] * weights * z + params * x["shift"],
        lambda params, x: params * x["shift"] / (1 - x["rate"] * weights),
        jnp.asarray(1.3),
        {"rate": rate, "shift": shift},
        jnp.zeros((5, UNITS)),
    )


def root() -> Problem:
    """``z = sqrt(z + p x)``, solved by ``(1 + sqrt(1 + 4 p x)) / 2``."""
    x = jnp.linspace(0.5, 30, 3 * UNITS).reshape(3, UNITS)
    return Problem(
        lambda params, z, x: jnp.sqrt(z + params * x),
        lambda params, x: (1 + jnp.sqrt(1 + 4 * params * x)) / 2,
        jnp.asarray(0.8),
        x,
        jnp.ones((3, UNITS)),
    )


def dense() -> Problem:
    """A tanh cell with a spectral norm of 0.9."""
    keys = jax.random.split(jax.random.key(2), 4)
    w = jax.random.normal(keys[0], (UNITS, UNITS))
    params = {
        "w": 0.9 * w / jnp.linalg.norm(w, 2),
        "u": jax.random.normal(keys[1], (4, UNITS)),
        "b": jax.random.normal(keys[2], (UNITS,)),
    }

    def cell(params: PyTree, z: Array, x: Array) -> Array:
        return jnp.tanh(z @ params["w"].T + x @ params["u"] + params["b"])

    x, z0 = jax.random.normal(keys[3], (3, 4)), jnp.zeros((3, UNITS))
    return Problem(cell, partial(by_newton, cell, z0), params, x, z0)


def convolutional() -> Problem:
    """A residual block of ``jdeq.nn``: convolutions and group normalisations, 4x4 of 8 channels."""
    return _convolutional((8,), state_scale=0.3)


def multiscale() -> Problem:
    """The multiscale cell of ``jdeq.nn``: two branches of 8 channels, at 4x4 and 2x2."""
    return _convolutional((8, 8), state_scale=0.5)


def _convolutional(widths: tuple[int, ...], state_scale: float) -> Problem:
    model = MultiscaleCell(
        widths, expansion=1, state_scale=state_scale, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(model)
    shapes = model.shapes(1, (4, 4))
    z0 = tuple(jnp.zeros(shape) for shape in shapes)

    def cell(params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        return nnx.merge(graph, params)(z, x)

    x = random_like(z0, jax.random.key(3))
    return Problem(cell, partial(by_newton, cell, z0), params, x, z0)


GROUPS: dict[str, dict[str, Callable[[], Problem]]] = {
    "small": {"linear": linear, "conditioned": conditioned, "root": root, "dense": dense},
    "convolutional": {"convolutional": convolutional},
    "multiscale": {"multiscale": multiscale},
}
"""Problems of a group are solved in one batch."""


def by_newton(cell: Callable, z0: PyTree, params: PyTree, x: PyTree) -> PyTree:
    """The solution by Newton's method, with derivatives of up to third order."""
    start, restore = jax.flatten_util.ravel_pytree(z0)

    def residual(z: Array, params: PyTree, x: PyTree) -> Array:
        return jax.flatten_util.ravel_pytree(cell(params, restore(z), x))[0] - z

    def newton(z: Array, params: PyTree, x: PyTree) -> Array:
        jacobian = jax.jacfwd(residual)(z, params, x)
        return z - jnp.linalg.solve(jacobian, residual(z, params, x))

    fixed = jax.lax.stop_gradient((params, x))
    z = jax.lax.fori_loop(
        0, 2000, lambda _, z: z + residual(z, *fixed), jax.lax.stop_gradient(start)
    )
    z = jax.lax.stop_gradient(jax.lax.fori_loop(0, 4, lambda _, z: newton(z, *fixed), z))
    for _ in range(2):
        z = newton(z, params, x)
    return restore(z)


def random_like(tree: PyTree, key: Array) -> PyTree:
    """Normal numbers in the shapes of ``tree``."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, jnp.shape(v)) for k, v in zip(keys, leaves, strict=True)]
    )
