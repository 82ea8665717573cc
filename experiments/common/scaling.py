"""An input problem in other units of its input: `x = s u`, with `s` a number a problem.

An optimiser whose steps do not depend on the gradient's scale, as Adam's do not, moves `u` at rate
1 just as it moves `x` at rate `s`. As `s` is data, one compiled program serves all rates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jdeq

PyTree = Any


class ScaledData(NamedTuple):
    """Data of a scaled problem.

    Attributes:
        factor: `s`, [B].
        data: `()`, or `(data,)` of the problem itself.
    """

    factor: Array
    data: tuple[PyTree, ...]


def scale_start(x0: PyTree, data: PyTree, rate: float) -> tuple[PyTree, ScaledData]:
    """`u0` and the data of the scaled problem, all of whose factors are `rate`."""
    count = len(jax.tree.leaves(x0)[0])
    factor = jnp.full((count,), rate, jnp.float32)
    rest = () if data is None else (data,)
    return _times(1 / factor, x0), ScaledData(factor, rest)


def scale_problem(problem: jdeq.InputProblem) -> jdeq.InputProblem:
    """The problem in `u`, with `x = s u` and `s` part of its data."""

    def cell(params: PyTree, z: PyTree, u: PyTree, at: ScaledData) -> PyTree:
        return problem.cell(params, z, _times(at.factor, u), *at.data)

    def objective(params: PyTree, z: PyTree, u: PyTree, target: PyTree, at: ScaledData) -> Array:
        return problem.objective(params, z, _times(at.factor, u), target, *at.data)

    if problem.project is None:
        return jdeq.InputProblem(cell, objective)
    unscaled = problem.project

    def project(u: PyTree, at: ScaledData) -> PyTree:
        return _times(1 / at.factor, unscaled(_times(at.factor, u), *at.data))

    return jdeq.InputProblem(cell, objective, project)


def _times(factor: Array, tree: PyTree) -> PyTree:
    """Each problem's leaves times its factor."""

    def scale(leaf: Array) -> Array:
        return factor.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype) * leaf

    return jax.tree.map(scale, tree)
