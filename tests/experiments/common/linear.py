"""An input problem with a closed form: z = A z + B x, and least squares in z."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import jdeq
from experiments.common.speed import Problems

STATE, INPUT, COUNT = 6, 3, 8


def cell(params, z, x):
    return z @ params["A"].T + x @ params["B"].T


def objective(params, z, x, target):
    del params
    return jnp.sum((z - target) ** 2, axis=-1) + 0.01 * jnp.sum(x**2, axis=-1)


PROBLEM = jdeq.InputProblem(cell, objective)


def problems(seed: int) -> Problems:
    keys = jax.random.split(jax.random.key(seed), 3)
    A = jax.random.normal(keys[0], (STATE, STATE))
    params = {
        "A": 0.6 * A / jnp.linalg.norm(A, 2),
        "B": jax.random.normal(keys[1], (STATE, INPUT)),
    }
    target = jax.random.normal(keys[2], (COUNT, STATE))
    return Problems(params, target, jnp.zeros((COUNT, INPUT)), jnp.zeros((COUNT, STATE)))


def value(at: Problems, x: jax.Array) -> jax.Array:
    """The objective at the equilibrium of x, in closed form."""
    state_of = jnp.linalg.solve(jnp.eye(STATE) - at.params["A"], at.params["B"])
    return objective(at.params, x @ state_of.T, x, at.target)
