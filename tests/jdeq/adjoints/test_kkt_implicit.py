"""The full gradient of joint solves against finite differences of the solve, and closed forms."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import KKTImplicit
from jdeq.solution import Result
from tests.jdeq import problems

SOLVE = {"rtol": 1e-11, "atol": 0.0, "max_steps": 2000}


def bent_cell(params, z, x):
    return jnp.tanh(z @ params["W"].T + x @ params["U"].T)


def bent_objective(params, z, x, target):
    return jnp.sum((z @ params["V"] - target) ** 2, 1) + params["weight"] * jnp.sum(x**2, 1)


BENT = {
    "free": jdeq.InputProblem(bent_cell, bent_objective),
    "box": jdeq.InputProblem(bent_cell, bent_objective, problems.into_box),
    "ball": jdeq.InputProblem(
        bent_cell, bent_objective, lambda x: jdeq.projections.l2_ball(x, jnp.full(len(x), 0.4))
    ),
}


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "W": jnp.array(problems.matrix(rng, 5, 5, 0.6)),
        "U": jnp.array(problems.matrix(rng, 5, 4, 1.0)),
        "V": jnp.array(problems.matrix(rng, 5, 5, 1.0)),
        "weight": jnp.array(0.1),
    }
    return params, jnp.array(0.5 * rng.normal(size=(3, 5)))


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), tree)


def outer(state):
    """An outer loss of all three blocks, not the inner one."""
    parts = [jnp.sum(jnp.sin(v) * (1 + jnp.arange(v.size).reshape(v.shape))) for v in state]
    return sum(parts)


@pytest.mark.parametrize("name", BENT)
def test_agrees_with_finite_differences_of_the_whole_solve(name):
    params, target = arguments()
    x0, z0 = jnp.zeros((3, 4)), jnp.zeros((3, 5))

    @jax.jit
    def loss(params, target):
        s = jdeq.joint_solve(BENT[name], params, target, x0, z0, adjoint=KKTImplicit(), **SOLVE)
        return outer(s.value), s

    gradient, s = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, target)
    assert np.all(s.result == Result.converged)
    if name != "free":
        outside = BENT["free"]
        free = jdeq.joint_solve(outside, params, target, x0, z0, **SOLVE).value.x
        assert np.any(np.abs(free - s.value.x) > 1e-2)  # some constraint is active
    for seed in range(2):
        direction = random_like((params, target), seed)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        got = sum(jnp.vdot(a, b) for a, b in pairs)

        def moved(t, direction=direction):
            at = jax.tree.map(lambda v, d: v + t * d, (params, target), direction)
            return loss(*at)[0]

        want = problems.central_difference(moved, 1e-3)
        assert abs(got - want) <= 1e-5 * abs(want)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_closed_form_of_a_ridge_regression(scale):
    """``x* = (R^T R + weight I)^-1 R^T t``, whatever the units of the objective."""
    o = problems.optimum(scale=scale)
    v = np.random.default_rng(0).normal(size=o.x.shape)

    @jax.jit
    @jax.grad
    def gradient(target):
        s = jdeq.joint_solve(
            o.problem, o.params, target, o.x0, o.z0, adjoint=KKTImplicit(), **SOLVE
        )
        return jnp.sum(s.value.x * v)

    W, U = np.asarray(o.params["W"]), np.asarray(o.params["U"])
    R = np.linalg.solve(np.eye(problems.N) - W, U)
    H = R.T @ R + problems.WEIGHT * np.eye(problems.M)
    np.testing.assert_allclose(gradient(o.target), (R @ np.linalg.solve(H, v.T)).T, rtol=1e-7)


def test_the_gradient_and_hessian_do_not_depend_on_an_infeasible_start():
    """Regression: units were taken at the start before it was projected, which may have none."""
    params, target = arguments()
    problem = jdeq.InputProblem(
        bent_cell,
        lambda *at: bent_objective(*at) - 0.1 * jnp.sum(jnp.log(at[2]), 1),
        lambda x: jdeq.projections.box(x, 0.2, 2.0),
    )

    @jax.jit
    def derivatives(x0):
        at = problem, params, target, x0, jnp.zeros((3, 5))

        def loss(params):
            solve = {"adjoint": KKTImplicit(), "rtol": 1e-9, "max_steps": 2000}
            return outer(jdeq.joint_solve(problem, params, *at[2:], **solve).value)

        def slope(params):
            def value(params):
                solve = {"rtol": 1e-9, "max_steps": 2000}
                return jnp.sum(jdeq.input_value(problem, params, *at[2:], **solve)[0])

            return jnp.sum(jax.grad(value)(params)["W"])

        return jax.grad(loss)(params), jax.grad(slope)(params)

    got, want = derivatives(jnp.zeros((3, 4))), derivatives(jnp.full((3, 4), 0.2))
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.any(expected != 0)
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize("unit", [1e-5, 1e-3, 1e4])
def test_the_gradient_does_not_depend_on_the_unit_of_the_state_in_float32(unit):
    """Regression: at 1e-3 it was off by 7e-3, and called converged; at 1e-5 by 8e-1."""

    def cell(params, z, x):
        return unit * bent_cell(params, z / unit, x)

    def objective(params, z, *given):
        return bent_objective(params, z / unit, *given)

    params, target = jax.tree.map(lambda v: v.astype(jnp.float32), arguments())
    x0, z0 = jnp.zeros((3, 4), jnp.float32), jnp.zeros((3, 5), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def gradient(problem, unit, params, target):
        def loss(params):
            solve = {"adjoint": KKTImplicit(), "rtol": 1e-5, "max_steps": 2000}
            at = jdeq.joint_solve(problem, params, target, x0, z0, **solve).value
            return outer((at.z / unit, at.x))

        return jax.grad(loss)(params)

    got = gradient(jdeq.InputProblem(cell, objective), unit, params, target)
    want = gradient(BENT["free"], 1.0, params, target)
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            leaf, expected, rtol=2e-4, atol=2e-4 * jnp.max(jnp.abs(want["W"]))
        )


def test_says_when_the_kkt_system_is_singular():
    """Two inputs that do the same, without a penalty: the optimum is a line."""
    target, x0, z0 = jnp.ones((2, 1)), jnp.zeros((2, 2)), jnp.zeros((2, 1))
    problem = jdeq.InputProblem(
        lambda _, z, x: 0.5 * z + jnp.sum(x, 1, keepdims=True),
        lambda _, z, x, target: jnp.sum((z - target) ** 2, 1),
    )

    def loss(probe):
        s = jdeq.joint_solve(
            problem, None, target, x0, z0, adjoint=KKTImplicit(max_steps=5, rtol=1e-8),
            rtol=1e-8, backward_probe=probe,
        )  # fmt: skip
        return jnp.sum(s.value.x[:, 0])

    rows = jax.jit(jax.grad(loss))(jnp.zeros((2, 3)))
    assert np.all(rows[:, 2] != Result.converged)
    assert np.all(rows[:, 0] > 1e-3)


def test_under_vmap_and_with_a_failed_neighbour():
    params, target = arguments()
    x0, z0 = jnp.zeros((3, 4)), jnp.zeros((3, 5))

    def loss(target):
        s = jdeq.joint_solve(
            BENT["free"], params, target, x0, z0, adjoint=KKTImplicit(), rtol=1e-9, max_steps=1000
        )
        return jnp.sum(jnp.sin(s.value.x))

    gradient = jax.jit(jax.grad(loss))
    want = gradient(target)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([target, target[::-1]]))
    np.testing.assert_allclose(mapped[0], want, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(mapped[1][::-1], want, rtol=1e-6, atol=1e-9)
    poisoned = gradient(target.at[1].set(jnp.nan))
    np.testing.assert_array_equal(poisoned[1], 0)
    np.testing.assert_allclose(poisoned[::2], want[::2], rtol=1e-6, atol=1e-9)
