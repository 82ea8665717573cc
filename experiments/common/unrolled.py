"""The joint iteration as a chain of differentiable steps, whose gradient is that of its end."""

from __future__ import annotations

import dataclasses
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
    rtol: float = 1e-3,
) -> jdeq.Solution:
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
        rtol: Of the outcome that is reported; nothing stops at it.

    Returns:
        The solution, its value the last iterate with mu short of `dl/dz`, differentiable; residuals
        and outcome are those of the same point, by one more evaluation.
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
    last = jdeq.AugmentedState(z, x, pulled)
    at = jax.lax.stop_gradient(last)
    measured = jdeq.joint_solve(
        problem, jax.lax.stop_gradient(params), target, at.x, at.z, data=data, mu0=at.mu,
        rtol=rtol, max_steps=1,
    )  # fmt: skip
    count = jnp.full_like(measured.steps, steps)
    return dataclasses.replace(measured, value=last, steps=count)
