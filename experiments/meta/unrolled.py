"""The joint iteration as a chain of differentiable steps, to compare implicit gradients with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jdeq

PyTree = Any


def unrolled_solve(
    problem: jdeq.InputProblem,
    params: PyTree,
    target: PyTree,
    x0: PyTree,
    z0: PyTree,
    data: PyTree,
    *,
    step_size: float,
    steps: int,
) -> jdeq.AugmentedState:
    """`jdeq.joint.Descent(step_size=step_size)`, all steps of it, differentiated step by step.

    The gradient is that of the last iterate, converged or not. Memory is one augmented iterate a
    step: within a step everything is computed anew. For problems without a constraint.

    Args:
        problem: See `jdeq.joint_solve`, as all further arguments.
        params: Differentiable.
        target: Differentiable.
        x0: First input.
        z0: First state.
        data: Constants of each problem, differentiable.
        step_size: First step of Adam on x.
        steps: All of which are made.

    Returns:
        The last iterate, its mu without `dl/dz`.
    """
    optimizer = jdeq.joint.Descent(step_size=step_size).transformation(steps)

    @jax.checkpoint
    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        z, x, pulled, memory = carry
        fz, pull_back = jax.vjp(lambda z, x: problem.cell(params, z, x, data), z, x)
        # The objective where the state goes next, as the joint solve takes it.
        objective, pull_back_loss = jax.vjp(
            lambda z, x: problem.objective(params, z, x, target, data), fz, x
        )
        slope, loss_x = pull_back_loss(jnp.ones_like(objective))
        pulled, cell_x = pull_back(jax.tree.map(jnp.add, pulled, slope))
        gradient = jax.tree.map(jnp.add, cell_x, loss_x)
        updates, memory = jax.vmap(optimizer.update)(gradient, memory, x)
        return (fz, optax.apply_updates(x, updates), pulled, memory), None

    zeros = jax.tree.map(jnp.zeros_like, z0)
    carry = (z0, x0, zeros, jax.vmap(optimizer.init)(x0))
    (z, x, pulled, _), _ = lax.scan(step, carry, None, length=steps)
    return jdeq.AugmentedState(z, x, pulled)
