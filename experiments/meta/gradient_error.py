"""The outer gradient against finite differences of the outer loss in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.common.data.tasks import Tasks
from experiments.meta.problem import Learner

PyTree = Any

_DIRECTIONS = 3
_STEP = 1e-3  # ten times as long, along the gradient itself the quotient is wrong by 1e-4
_DOUBLE_RTOL = 1e-12
_SINGLE_RTOL = 1e-5


class GradientError(NamedTuple):
    """Largest relative errors of directional derivatives.

    Attributes:
        single: Of the KKT-implicit gradient in float32.
        double: Of the KKT-implicit gradient in float64.
    """

    single: float
    double: float


def gradient_error(
    learner: Learner, params: PyTree, tasks: Tasks, ways: int, seed: int
) -> GradientError:
    """Derivatives of the outer loss of `tasks` along random directions and the gradient's own.

    The difference quotient is central and of fourth order, of solves to a relative 1e-12.

    Args:
        learner: The learner.
        params: Parameters to differentiate at.
        tasks: A small batch.
        ways: Classes a task.
        seed: Of the directions.
    """
    single = jax.jit(jax.grad(_tight_loss(learner, tasks, ways, _SINGLE_RTOL)))(params)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, tasks, single))
        params, tasks, single = jax.tree.map(jnp.asarray, wide)
        # One program for values and gradient, since a second one takes longest to compile.
        solved = jax.jit(jax.value_and_grad(_tight_loss(learner, tasks, ways, _DOUBLE_RTOL)))
        double = solved(params)[1]
        errors = []
        for direction in _directions(double, seed):
            quotient = _quotient(lambda at: solved(at)[0], params, direction)
            along = [optax.tree.vdot(g, direction) for g in (single, double)]
            errors.append([float(abs(slope / quotient - 1)) for slope in along])
    return GradientError(*np.max(errors, axis=0).tolist())


def _tight_loss(learner: Learner, tasks: Tasks, ways: int, rtol: float) -> Any:
    """The outer loss of well-solved tasks."""
    label, query_label = tasks.support_label, tasks.query_label
    if not learner.regression:
        label, query_label = (jnp.asarray(each, jnp.int32) for each in (label, query_label))
    target, wanted = learner.target(label, ways), learner.target(query_label, ways)

    def loss(params: PyTree) -> Array:
        solution = learner.adapt_tightly(params, tasks.support, target, rtol)
        outputs = learner.predict(params, solution.value, target, tasks.query, rtol)
        return jnp.mean(learner.losses(outputs, wanted))

    return loss


def _directions(gradient: PyTree, seed: int) -> list[PyTree]:
    """Unit vectors: the gradient's own and random ones."""
    leaves, structure = jax.tree.flatten(gradient)
    random = np.random.default_rng(seed)
    drawn = [
        jax.tree.unflatten(
            structure, [jnp.asarray(random.standard_normal(leaf.shape)) for leaf in leaves]
        )
        for _ in range(_DIRECTIONS)
    ]
    return [optax.tree.scale(1 / optax.tree.norm(d), d) for d in (gradient, *drawn)]


def _quotient(loss: Any, params: PyTree, direction: PyTree) -> float:
    """The derivative along a direction, from four values of the loss."""

    def at(step: float) -> float:
        return float(loss(optax.tree.add_scale(params, step, direction)))

    near, far = at(_STEP) - at(-_STEP), at(2 * _STEP) - at(-2 * _STEP)
    return (8 * near - far) / (12 * _STEP)
