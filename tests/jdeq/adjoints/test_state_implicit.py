"""The state-implicit gradient: through the equilibrium, with the input held."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.adjoints import StateImplicit
from jdeq.joint import Accelerated, Descent
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems


def bent_cell(params, z, x, data):
    return jnp.tanh(z @ params["W"].T + x @ params["U"].T + data["shift"])


def bent_objective(params, z, x, target, data):
    distance = jnp.sum((z @ params["V"] - target) ** 2, 1)
    return distance + 0.1 * jnp.sum(x**2, 1) + 0 * data["shift"][:, 0]


BENT = jdeq.InputProblem(bent_cell, bent_objective)
SOLVE = {"rtol": 1e-9, "max_steps": 1000}


def arguments(seed):
    rng = np.random.default_rng(seed)
    params = {
        "W": jnp.array(problems.matrix(rng, 5, 5, 0.6)),
        "U": jnp.array(problems.matrix(rng, 5, 4, 1.0)),
        "V": jnp.array(problems.matrix(rng, 5, 5, 1.0)),
    }
    data = {"shift": jnp.array(0.2 * rng.normal(size=(3, 5)))}
    return params, jnp.array(0.3 * rng.normal(size=(3, 5))), data


def outer(z):
    return jnp.sum(jnp.sin(z) * (1 + jnp.arange(z.size).reshape(z.shape)))


@jax.jit
def joint_gradient(params, target, data):
    def loss(params, target, data):
        x0, z0 = jnp.zeros((3, 4)), jnp.zeros((3, 5))
        adjoint = StateImplicit(rtol=1e-13, atol=0.0, max_steps=500)
        s = jdeq.joint_solve(BENT, params, target, x0, z0, data=data, adjoint=adjoint, **SOLVE)
        return outer(s.value.z), s

    return jax.grad(loss, (0, 1, 2), has_aux=True)(params, target, data)


@jax.jit
def held_loss(params, data, x):
    """The same outer loss at the equilibrium of a given x."""
    z0 = jnp.zeros((3, 5))
    s = jdeq.deq(
        bent_cell, params, x, z0, data=data, solver=Picard(), rtol=1e-13, atol=0.0, max_steps=500
    )
    return outer(s.value)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_finite_differences_with_x_held(seed):
    params, target, data = arguments(seed)
    (params_bar, target_bar, data_bar), s = joint_gradient(params, target, data)
    assert np.all(s.result == Result.converged)
    rng = np.random.default_rng(seed)
    for argument, bar in ((0, params_bar), (1, data_bar)):
        at = (params, data)
        d = jax.tree.map(lambda v: jnp.array(rng.normal(size=v.shape)), at[argument])

        def moved(t, argument=argument, at=at, d=d):
            new = [*at]
            new[argument] = jax.tree.map(lambda v, u: v + t * u, at[argument], d)
            return held_loss(*new, s.value.x)

        want = problems.central_difference(moved)
        got = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, bar, d)))
        assert abs(got - want) <= 1e-6 * abs(want)
    # The objective's own parameters and target move x alone, which is held.
    np.testing.assert_array_equal(params_bar["V"], 0)
    np.testing.assert_array_equal(target_bar, 0)


@pytest.mark.parametrize("method", [Descent(optax.sgd(0.05)), Accelerated(Anderson(5), 0.05)])
def test_the_gradient_does_not_depend_on_the_method(method):
    o = problems.optimum()

    @jax.jit
    def gradient(params):
        def loss(params):
            s = jdeq.joint_solve(
                o.problem, params, o.target, o.x0, o.z0, method=method, rtol=1e-10, max_steps=2000
            )
            return outer(s.value.z)

        return jax.grad(loss)(params)

    W = np.asarray(o.params["W"])
    v = jax.grad(outer)(jnp.array(o.z))
    u = np.linalg.solve((np.eye(problems.N) - W).T, v.T).T
    got = gradient(o.params)
    np.testing.assert_allclose(got["W"], u.T @ o.z, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(got["U"], u.T @ o.x, rtol=1e-6, atol=1e-8)


def test_nested_solve_has_the_same_gradient():
    params, target, data = arguments(0)
    (want, _, want_data), _ = joint_gradient(params, target, data)
    x0, z0 = jnp.zeros((3, 4)), jnp.zeros((3, 5))
    inner = jdeq.joint.InnerSolve(solver=Picard(), max_steps=200, rtol=1e-11)

    @jax.jit
    def gradient(params, data):
        def loss(params, data):
            s = jdeq.nested_solve(
                BENT,
                params,
                target,
                x0,
                z0,
                data=data,
                optimizer=optax.sgd(0.2),
                forward=inner,
                max_steps=500,
                rtol=1e-8,
            )
            return outer(s.value.z)

        return jax.grad(loss, (0, 1))(params, data)

    got = gradient(params, data)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((want, want_data)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_multiple_of_the_inner_loss_starts_at_the_answer():
    """The forward adjoint is the backward one then, and the backward solve only confirms it."""
    o = problems.optimum()

    @jax.jit
    def probed(slope):
        def loss(probe):
            s = jdeq.joint_solve(*o.arguments, rtol=1e-8, max_steps=1000, backward_probe=probe)
            # dl/dz times a constant, whatever x does.
            return slope * jnp.sum((s.value.z - o.target) ** 2)

        return jax.grad(loss)(jnp.zeros((problems.B, 3)))

    def other(probe):
        s = jdeq.joint_solve(*o.arguments, rtol=1e-8, max_steps=1000, backward_probe=probe)
        return jnp.sum(jnp.sin(5 * s.value.z))

    for slope in (1.0, -1e-6):
        rows = probed(slope)
        assert np.all(rows[:, 1] <= 2)
        assert np.all(rows[:, 2] == Result.converged)
    rows = jax.jit(jax.grad(other))(jnp.zeros((problems.B, 3)))
    assert np.all(rows[:, 1] > 2)
    assert np.all(rows[:, 2] == Result.converged)


def test_only_the_state_carries_a_gradient():
    o = problems.optimum()

    @jax.jit
    def gradients(params, x0, z0):
        def loss(params, x0, z0):
            s = jdeq.joint_solve(o.problem, params, o.target, x0, z0, history=True)
            rest = (s.value.x, s.value.mu, s.residual, s.aux)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(rest))

        def of_state(params, x0, z0):
            return jnp.sum(jdeq.joint_solve(o.problem, params, o.target, x0, z0).value.z)

        return jax.grad(loss, (0, 1, 2))(params, x0, z0), jax.grad(of_state, (1, 2))(params, x0, z0)

    for leaf in jax.tree.leaves(gradients(o.params, o.x0, o.z0)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("bad", [[1], [0, 2], [0, 1, 2]])
def test_a_failing_problem_contributes_zero(bad):
    params, target, data = arguments(0)
    bad = np.array(bad)
    good = np.setdiff1d(np.arange(3), bad)
    poisoned = {"shift": data["shift"].at[bad, 0].set(jnp.nan)}
    (params_bar, _, data_bar), s = joint_gradient(params, target, poisoned)
    assert np.all(s.result[bad] == Result.non_finite)
    np.testing.assert_array_equal(data_bar["shift"][bad], 0)
    if not good.size:
        for leaf in jax.tree.leaves(params_bar):
            np.testing.assert_array_equal(leaf, 0)
        return
    clean_bar, clean = joint_gradient(params, target, data)
    np.testing.assert_allclose(data_bar["shift"][good], clean_bar[2]["shift"][good], rtol=1e-12)

    def of_good(params):
        weight = jnp.zeros((3, 1)).at[good].set(1.0)
        s = jdeq.deq(bent_cell, params, clean.value.x, jnp.zeros((3, 5)), data=data, rtol=1e-12)
        return jnp.sum(weight * jnp.sin(s.value) * (1 + jnp.arange(15.0).reshape(3, 5)))

    want = jax.jit(jax.grad(of_good))(params)
    np.testing.assert_allclose(params_bar["W"], want["W"], rtol=1e-6, atol=1e-8)


def test_the_backward_solve_shares_limits_and_budget_with_the_joint_one():
    o = problems.optimum()

    def steps(adjoint, **options):
        def loss(probe):
            s = jdeq.joint_solve(
                *o.arguments, adjoint=adjoint, rtol=1e-12, backward_probe=probe, **options
            )
            return jnp.sum(jnp.sin(5 * s.value.z))

        return jax.jit(jax.grad(loss))(jnp.zeros((problems.B, 3)))[:, 1].tolist()

    picard = StateImplicit(solver=Picard())
    assert steps(picard, max_steps=6) == [6] * 3
    assert steps(picard, max_steps=20, step_budget=5) == [5] * 3
    own = StateImplicit(solver=Picard(), max_steps=9)
    assert steps(own, max_steps=20, step_budget=5) == [9] * 3
