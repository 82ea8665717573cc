"""Model-agnostic meta-learning (Finn et al., 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.meta.baselines.networks import start

PyTree = Any

_STEPS = 5


def maml(
    graph: nnx.GraphDef, loss: Callable[[Array, Array], Array], *, first_order: bool
) -> Callable[[PyTree, Array, Array, Array], Array]:
    """Outputs for a task's queries after five gradient steps on its support.

    The step sizes of body and head are learnt, as in MAML++ (Antoniou et al., 2019).

    Args:
        graph: Of the `Classifier`.
        loss: Of outputs and targets.
        first_order: Whether the steps' own derivatives are left out.
    """

    def adapted(params: PyTree, support: Array, target: Array, query: Array) -> Array:
        task, fast = start(graph, params, target.shape[-1])
        body_step, head_step = jnp.exp(nnx.merge(graph, params).log_steps[...])

        def descend(fast: PyTree, _: None) -> tuple[PyTree, None]:
            gradient = jax.grad(lambda fast: loss(nnx.merge(task, fast)(support), target))(fast)
            if first_order:
                gradient = jax.lax.stop_gradient(gradient)

            def move(path: tuple, w: Array, g: Array) -> Array:
                return w - (body_step if path[0].key == "body" else head_step) * g

            return jax.tree_util.tree_map_with_path(move, fast, gradient), None

        fast, _ = jax.lax.scan(jax.checkpoint(descend), fast, None, length=_STEPS)
        return nnx.merge(task, fast)(query)

    return adapted
