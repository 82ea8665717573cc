"""joint_solve on states and inputs of several leaves and dtypes, with integers and keys beside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.joint import Accelerated, Polished
from jdeq.solution import Result
from tests.jdeq import problems


def tree_cell(params, z, x):
    a = 0.5 * z["a"] + x["u"] + 0.2 * z["b"][:, :2].astype(z["a"].dtype)
    b = 0.3 * z["b"] + x["v"][:, None].astype(z["b"].dtype)
    return {"a": a.astype(z["a"].dtype), "b": b}


def tree_objective(params, z, x, target):
    distance = jnp.sum((z["a"] - target["a"]) ** 2, 1) + jnp.sum((z["b"] - 1) ** 2, 1)
    return distance + 0.1 * (jnp.sum(x["u"] ** 2, 1) + x["v"] ** 2)


def tree_answer(a):
    """Ridge regression in (u, v) with ``z_b = v / 0.7`` and ``z_a = 2 u + 0.4 z_b``."""
    b = 1 / 0.7
    rows = np.array([[2, 0, 0.4 * b], [0, 2, 0.4 * b], [0, 0, b], [0, 0, b], [0, 0, b]], np.float64)
    right = np.concatenate([a, np.ones(3)])
    return np.linalg.solve(rows.T @ rows + 0.1 * np.eye(3), rows.T @ right)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (jnp.float64, jnp.float64),
        (jnp.float64, jnp.float32),  # regression: the default method mixed their dtypes up
        (jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("name", ["polished", "accelerated", "nested"])
def test_states_and_inputs_of_several_leaves_and_dtypes(name, wide, narrow):
    problem = jdeq.InputProblem(tree_cell, tree_objective)
    a = np.array([[1.0, -1.0], [0.5, 2.0]])
    target = {"a": jnp.array(a, wide)}
    x0 = {"u": jnp.zeros((2, 2), wide), "v": jnp.zeros(2, narrow)}
    z0 = {"a": jnp.zeros((2, 2), wide), "b": jnp.zeros((2, 3), narrow)}
    fine = {jnp.bfloat16: 3e-2, jnp.float32: 1e-4, jnp.float64: 1e-7}[narrow]
    if name == "nested":
        s = jdeq.nested_solve(
            problem,
            None,
            target,
            x0,
            z0,
            optimizer=optax.sgd(0.05),
            forward=jdeq.joint.InnerSolve(rtol=fine / 10, max_steps=30),
            max_steps=300,
            rtol=fine,
        )
    else:
        method = Polished() if name == "polished" else Accelerated(step_size=0.05)
        s = jdeq.joint_solve(problem, None, target, x0, z0, method=method, rtol=fine, max_steps=300)
    like = jax.tree.map(lambda v: v.dtype, (z0, x0, z0))
    assert jax.tree.map(lambda v: v.dtype, tuple(s.value)) == like
    got = np.concatenate(
        [np.asarray(s.value.x["u"], float), np.asarray(s.value.x["v"], float)[:, None]], axis=1
    )
    want = np.stack([tree_answer(row) for row in a])
    np.testing.assert_allclose(got, want, atol=5 * fine)


def test_integer_targets_and_keys_in_data():
    """Class labels and dropout keys, as in an adversarial attack."""
    o = problems.optimum()
    labels = jnp.array([0, 3, 1])
    data = {
        "key": jax.random.split(jax.random.key(0), problems.B),
        "on": jnp.ones(problems.B, bool),
    }

    def cell(params, z, x, data):
        mask = jax.vmap(jax.random.uniform)(data["key"])[:, None] * data["on"][:, None]
        return jnp.tanh(problems.linear_cell(params, z, x) + 0.1 * mask)

    def objective(params, z, x, target, data):
        loss = optax.softmax_cross_entropy_with_integer_labels(z, target)
        return loss + 0.1 * jnp.sum(x**2, 1)

    problem = jdeq.InputProblem(cell, objective)

    @jax.jit
    def run(params):
        def loss(params):
            s = jdeq.joint_solve(problem, params, labels, o.x0, o.z0, data=data, max_steps=500)
            return jnp.sum(jnp.sin(s.value.z)), s

        def value(params):
            v, s = jdeq.input_value(problem, params, labels, o.x0, o.z0, data=data, max_steps=500)
            return jnp.sum(v), s

        return jax.grad(loss, has_aux=True)(params), jax.grad(value, has_aux=True)(params)

    (by_state, s), (by_value, t) = run(o.params)
    assert np.all(s.result == Result.converged)
    np.testing.assert_allclose(t.value.x, s.value.x, atol=1e-8)
    assert np.all(s.aux.objective < np.log(problems.N))
    for bar in (by_state, by_value):
        assert np.any(bar["W"] != 0)
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(bar))
