"""Implicit model-agnostic meta-learning with an explicit network (Rajeswaran et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.scipy.sparse.linalg import cg

from experiments.meta.baselines.networks import start

PyTree = Any

_STEPS = 16
_STEP_SIZE = 0.1
_PENALTY = 2.0
_CG_STEPS = 5


def imaml(
    graph: nnx.GraphDef,
    loss: Callable[[Array, Array], Array],
    *,
    steps: int = _STEPS,
    cg_steps: int = _CG_STEPS,
) -> Callable[[PyTree, Array, Array, Array], Array]:
    """Outputs for a task's queries with the network that minimises a penalised loss.

        phi* = argmin  L(phi) + l ||phi - theta||^2 / 2

    Gradient descent finds it; the gradient through it, `(I + H / l)^-1 v` with the Hessian H of L
    at phi*, takes conjugate gradients; sixteen and five steps are as published. No step is stored.

    Args:
        graph: Of the `Classifier`.
        loss: Of outputs and targets.
        steps: Of gradient descent.
        cg_steps: Of conjugate gradients.
    """

    def adapted(params: PyTree, support: Array, target: Array, query: Array) -> Array:
        task, prior = start(graph, params, target.shape[-1])

        def slope(fast: PyTree, support: Array, target: Array) -> PyTree:
            return jax.grad(lambda fast: loss(nnx.merge(task, fast)(support), target))(fast)

        @jax.custom_vjp
        def minimiser(prior: PyTree, support: Array, target: Array) -> PyTree:
            def descend(_: Array, fast: PyTree) -> PyTree:
                gradient = slope(fast, support, target)
                return jax.tree.map(
                    lambda w, g, w0: w - _STEP_SIZE * (g + _PENALTY * (w - w0)),
                    fast, gradient, prior,
                )  # fmt: skip

            return jax.lax.fori_loop(0, steps, descend, prior)

        def forward(prior: PyTree, support: Array, target: Array) -> tuple[PyTree, tuple]:
            fast = minimiser(prior, support, target)
            return fast, (fast, support, target)

        def backward(saved: tuple, cotangent: PyTree) -> tuple[PyTree, None, None]:
            fast, support, target = saved

            def matvec(v: PyTree) -> PyTree:
                _, curved = jax.jvp(lambda fast: slope(fast, support, target), (fast,), (v,))
                return jax.tree.map(lambda v, h: v + h / _PENALTY, v, curved)

            solved, _ = cg(matvec, cotangent, maxiter=cg_steps)
            return solved, None, None

        minimiser.defvjp(forward, backward)
        return nnx.merge(task, minimiser(prior, support, target))(query)

    return adapted
