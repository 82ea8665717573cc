"""The optimal value, its envelope gradient, and its Hessian products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.joint import Accelerated
from jdeq.solution import Result
from jdeq.solvers import Anderson
from tests.jdeq import problems

METHOD = Accelerated(Anderson(8), step_size=0.2)
SOLVE = {"method": METHOD, "rtol": 1e-11, "atol": 0.0, "max_steps": 2000}


def bent_cell(params, z, x, data):
    return jnp.tanh(z @ params["W"].T + x @ params["U"].T + data["shift"])


def bent_objective(params, z, x, target, data):
    distance = jnp.sum((z @ params["V"] - target) ** 2, 1)
    return distance + params["weight"] * jnp.sum(x**2, 1) + 0 * data["radius"]


def into_ball(x, data):
    return jdeq.projections.l2_ball(x, data["radius"])


def into_box(x, data):
    return jdeq.projections.box(x, -data["radius"][:, None], 0.1)


def into_simplex(x, data):
    scaled = x / data["radius"][:, None]
    return jdeq.projections.simplex(scaled) * data["radius"][:, None]


PROBLEMS = {
    name: jdeq.InputProblem(bent_cell, bent_objective, project)
    for name, project in {
        "free": None,
        "ball": into_ball,
        "box": into_box,
        "simplex": into_simplex,
    }.items()
}


def arguments(seed):
    rng = np.random.default_rng(seed)
    params = {
        "W": jnp.array(problems.matrix(rng, 5, 5, 0.5)),
        "U": jnp.array(problems.matrix(rng, 5, 4, 1.0)),
        "V": jnp.array(problems.matrix(rng, 5, 5, 1.0)),
        "weight": jnp.array(0.2),
    }
    data = {
        "shift": jnp.array(0.2 * rng.normal(size=(3, 5))),
        "radius": jnp.array([0.1, 0.2, 0.3]),
    }
    return {"params": params, "target": jnp.array(rng.normal(size=(3, 5))), "data": data}


def values(name, params, target, data):
    x0, z0 = jnp.zeros((3, 4)), jnp.zeros((3, 5))
    return jdeq.input_value(PROBLEMS[name], params, target, x0, z0, data=data, **SOLVE)


WEIGHTS = np.array([1.0, -2.0, 0.5])
"""Outer weights of both signs: the outer loss is plus or minus the optimal value."""


@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_finite_differences(name):
    """In params, target and data, of which the constraint depends on one leaf.

    Regression: the dependence of the constraint was left out.
    """

    @jax.jit
    def loss(at):
        v, s = values(name, **at)
        return jnp.vdot(jnp.array(WEIGHTS), v), s

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for seed in range(2):
        at = arguments(seed)
        bar, s = gradient(at)
        assert np.all(s.result == Result.converged)
        for leaf, leaf_bar, put in each_leaf(at, bar):
            direction = jnp.array(np.random.default_rng(seed).normal(size=leaf.shape))
            want = problems.central_difference(
                lambda t, leaf=leaf, put=put, direction=direction: loss(put(leaf + t * direction))[
                    0
                ]
            )
            got = jnp.vdot(leaf_bar, direction)
            assert abs(got - want) <= 1e-6 * abs(want) + 1e-9


def each_leaf(tree, other):
    """Every leaf with its namesake in ``other`` and a function that puts another in its place."""
    leaves, structure = jax.tree.flatten(tree)
    for i, pair in enumerate(zip(leaves, jax.tree.leaves(other), strict=True)):

        def put(leaf, i=i):
            return jax.tree.unflatten(structure, [*leaves[:i], leaf, *leaves[i + 1 :]])

        yield *pair, put


def test_closed_form_of_the_value_and_its_gradient():
    o = problems.optimum()

    def loss(params, target, x0, z0):
        v, s = jdeq.input_value(o.problem, params, target, x0, z0, **SOLVE)
        return jnp.sum(v), (v, s)

    run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
    (params_bar, target_bar, x_bar, z_bar), (v, s) = run(o.params, o.target, o.x0, o.z0)
    np.testing.assert_allclose(v, o.objective, rtol=1e-9)
    np.testing.assert_array_equal(v, s.aux.objective)
    np.testing.assert_allclose(s.value.x, o.x, atol=1e-8)
    np.testing.assert_allclose(params_bar["W"], o.mu.T @ o.z, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(params_bar["U"], o.mu.T @ o.x, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(params_bar["scale"], np.sum(o.objective), rtol=1e-9)
    np.testing.assert_allclose(params_bar["weight"], 0.5 * np.sum(o.x**2), rtol=1e-7)
    np.testing.assert_allclose(target_bar, o.target - o.z, atol=1e-8)
    np.testing.assert_array_equal(x_bar, 0)
    np.testing.assert_array_equal(z_bar, 0)


def test_the_solution_is_a_constant():
    o = problems.optimum()

    def loss(params):
        _, s = jdeq.input_value(*(o.problem, params, *o.arguments[2:]), **SOLVE)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((s.value, s.residual, s.aux)))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(o.params)):
        np.testing.assert_array_equal(leaf, 0)


def outer_loss(name, at, weights):
    """A weighted sum of optimal values, and what their solve returns."""
    v, s = values(name, **at)
    return jnp.vdot(weights, jnp.nan_to_num(v)), s


def tree_dot(a, b):
    return sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@functools.partial(jax.jit, static_argnums=0)
def hessian_product(name, at, direction, weights):
    def slope(at):
        return tree_dot(jax.grad(lambda at: outer_loss(name, at, weights)[0])(at), direction)

    return jax.grad(slope)(at)


def direction_like(at):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape)), at)


@pytest.mark.parametrize("name", ["free", "ball", "box"])
def test_hessian_products_agree_with_finite_differences_of_the_gradient(name):
    """In params, target and data jointly, whose radius all of the active constraints depend on."""
    at = arguments(0)
    direction = direction_like(at)
    gradient = jax.jit(jax.grad(lambda at: outer_loss(name, at, jnp.array(WEIGHTS)), has_aux=True))
    bar, s = gradient(at)
    assert np.all(s.result == Result.converged)
    assert np.any(bar["data"]["radius"] != 0) == (name != "free")

    def moved(t):
        return gradient(jax.tree.map(lambda leaf, d: leaf + t * d, at, direction))[0]

    points = [moved(t) for t in (1e-3, -1e-3, 2e-3, -2e-3)]
    want = jax.tree.map(lambda a, b, c, d: (8 * (a - b) - (c - d)) / 12e-3, *points)
    got = hessian_product(name, at, direction, jnp.array(WEIGHTS))
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(leaf - expected) <= 1e-6 * np.linalg.norm(expected)


def test_closed_form_of_the_hessian():
    """``V(t) = min_x (||R x - t||^2 + w ||x||^2) / 2`` has ``I - R (R^T R + w)^-1 R^T``."""
    o = problems.optimum()

    def value(target):
        return jnp.sum(jdeq.input_value(o.problem, o.params, target, o.x0, o.z0, **SOLVE)[0])

    hessian = jax.jit(jax.jacrev(jax.grad(value)))(o.target)
    R = np.linalg.solve(np.eye(problems.N) - o.params["W"], o.params["U"])
    H = R.T @ R + problems.WEIGHT * np.eye(problems.M)
    want = np.eye(problems.N) - R @ np.linalg.solve(H, R.T)
    for i in range(problems.B):
        for j in range(problems.B):
            expected = want if i == j else 0 * want
            np.testing.assert_allclose(hessian[i, :, j], expected, atol=1e-8)


def test_a_failing_problem_has_no_part_in_hessian_products():
    clean = arguments(0)
    direction = direction_like(clean)
    poisoned = {**clean, "target": clean["target"].at[1, 0].set(jnp.nan)}
    got = hessian_product("ball", poisoned, direction, jnp.array(WEIGHTS))
    want = hessian_product("ball", clean, direction, jnp.array(WEIGHTS).at[1].set(0.0))
    np.testing.assert_array_equal(got["target"][1], 0)
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-9)


class Refusing:
    """A solver that must not be asked."""

    def init(self, z):
        raise AssertionError("the KKT system was set up")

    def step(self, z, fz, memory, k):
        raise AssertionError


def test_a_first_derivative_sets_up_no_kkt_system():
    """Nothing of the second derivative's cost, in compilation or at run time."""
    o = problems.optimum()
    adjoint = jdeq.adjoints.KKTImplicit(solver=Refusing())

    def value(scale):
        arguments = o.problem, o.params, scale * o.target, o.x0, o.z0
        return jnp.sum(jdeq.input_value(*arguments, adjoint=adjoint, **SOLVE)[0])

    assert np.isfinite(jax.jit(jax.grad(value))(1.0))
    with pytest.raises(AssertionError, match="KKT system"):
        jax.grad(jax.grad(value))(1.0)


def test_an_adjoint_that_holds_the_input_constant_is_refused():
    o = problems.optimum()
    with pytest.raises(TypeError, match="KKTImplicit"):
        jdeq.input_value(*o.arguments, adjoint=jdeq.adjoints.StateImplicit())


def test_default_tolerances_suffice_for_a_useful_gradient():
    """The error is of the order of the residuals; the documentation says so."""
    o = problems.optimum("box")

    def loss(params):
        return jnp.sum(jdeq.input_value(*(o.problem, params, *o.arguments[2:]))[0])

    got = jax.jit(jax.grad(loss))(o.params)
    assert problems.relative_error(got["W"], o.mu.T @ o.z) < 2e-2


@pytest.mark.parametrize("place", ["target", "shift", "radius"])
@pytest.mark.parametrize("bad", [[1], [0, 2], [0, 1, 2]])
def test_a_failing_problem_contributes_zero_and_has_no_value(place, bad):
    bad = np.array(bad)
    good = np.setdiff1d(np.arange(3), bad)
    clean = arguments(0)

    def poison(leaf):
        return leaf.at[(bad, *[0] * (leaf.ndim - 1))].set(jnp.nan)

    poisoned = {**clean, "data": {**clean["data"]}}
    where = poisoned if place == "target" else poisoned["data"]
    where[place] = poison(where[place])

    bar, (v, s) = _ball_gradient(poisoned, jnp.ones(3))
    assert np.all(s.result[bad] == Result.non_finite)
    assert np.all(np.isnan(v[bad]))
    weight = jnp.zeros(3).at[good].set(1.0)
    want, (clean_v, _) = _ball_gradient(clean, weight)
    np.testing.assert_array_equal(v[good], clean_v[good])
    for got, expected in zip(jax.tree.leaves(bar), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-13)


@jax.jit
def _ball_gradient(at, weight):
    def loss(at):
        v, s = values("ball", **at)
        return jnp.vdot(weight, jnp.nan_to_num(v)), (v, s)

    return jax.grad(loss, has_aux=True)(at)


def test_a_zero_gradient_at_zero_blocks_no_projection():
    """Where x and its gradient vanish together, norms have no derivative, and none is needed."""

    def cell(params, z, x, data):
        return 0.5 * z + params * x + 0 * data[:, None]

    def objective(params, z, x, target, data):
        return jnp.sum(z**2, 1) + jnp.sum(x**2, 1) + 0 * data

    problem = jdeq.InputProblem(cell, objective, jdeq.projections.l2_ball)
    zeros = jnp.zeros((2, 3))

    def loss(params, data):
        return jnp.sum(jdeq.input_value(problem, params, zeros, zeros, zeros, data=data)[0])

    bars = jax.jit(jax.grad(loss, (0, 1)))(jnp.array(0.5), jnp.ones(2))
    for leaf in bars:
        np.testing.assert_array_equal(leaf, 0)


def test_float32_values_and_gradients_keep_their_dtype():
    o = problems.optimum()
    cast = jax.tree.map(lambda v: v.astype(jnp.float32), (o.params, o.target, o.x0, o.z0))

    def loss(params, target, x0, z0):
        v, s = jdeq.input_value(
            o.problem, params, target, x0, z0, method=Accelerated(Anderson(8), 0.2), rtol=1e-5
        )
        return jnp.sum(v), (v, s)

    bar, (v, s) = jax.jit(jax.grad(loss, has_aux=True))(*cast)
    assert v.dtype == jnp.float32
    assert np.all(s.result == Result.converged)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(bar))
    assert problems.relative_error(bar["W"], o.mu.T @ o.z) < 1e-3


def test_schedules_of_optax_inside_the_value():
    """An optimiser of one's own serves input_value as it does joint_solve."""
    o = problems.optimum()
    rate = optax.exponential_decay(0.2, 50, 0.5)
    v, s = jdeq.input_value(
        *o.arguments, method=jdeq.joint.Descent(optax.adabelief(rate)), max_steps=300
    )
    np.testing.assert_allclose(v, o.objective, rtol=1e-3)
    assert np.all(s.steps <= 300)
