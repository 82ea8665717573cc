"""Arrays that functions capture are hoisted: floats get gradients, and nothing leaks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.solvers import Picard
from tests.jdeq import problems

# Picard compiles fastest.
TIGHT = {"solver": Picard(), "rtol": 1e-12, "atol": 0.0, "max_steps": 1000}


def assert_trees_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), got, want)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_captured_floats_get_the_gradient_of_params(transform):
    p = problems.tanh(norm=0.6)

    def explicit(params, x):
        return jnp.sum(jnp.sin(jdeq.deq(p.cell, params, x, p.z0, **TIGHT).value))

    def captured(params, x):
        s = jdeq.deq(lambda _, z, x: p.cell(params, z, x), None, x, p.z0, **TIGHT)
        return jnp.sum(jnp.sin(s.value))

    def all_captured(params, x):
        s = jdeq.fixed_point(lambda _, z: p.cell(params, z, x), None, p.z0, **TIGHT)
        return jnp.sum(jnp.sin(s.value))

    want = transform(jax.grad(explicit, (0, 1)))(p.params, p.x)
    assert_trees_close(transform(jax.grad(captured, (0, 1)))(p.params, p.x), want)
    assert_trees_close(transform(jax.grad(all_captured, (0, 1)))(p.params, p.x), want)


def test_captured_integers_booleans_and_keys():
    p = problems.tanh(norm=0.6)

    def loss(W, key, count, on):
        def cell(params, z, x):
            noise = jax.random.uniform(key)
            return jnp.tanh(z @ W.T + jnp.where(on, x, -x) + 0.1 * noise + 0.01 * count)

        return jnp.sum(jdeq.deq(cell, None, p.x, p.z0, **TIGHT).value)

    arguments = (p.params["W"], jax.random.key(3), jnp.asarray(2), jnp.asarray(True))
    eager = jax.grad(loss)(*arguments)
    direction, compiled = jnp.ones_like(arguments[0]), jax.jit(loss)
    want = problems.central_difference(
        lambda t: compiled(arguments[0] + t * direction, *arguments[1:])
    )
    np.testing.assert_allclose(jnp.sum(eager), want, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(*arguments), eager, rtol=1e-9)
    keys, counts = jax.random.split(jax.random.key(3), 2), jnp.arange(2)
    mapped = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, None)))(
        arguments[0], keys, counts, arguments[3]
    )
    for i in range(2):
        one = jax.jit(jax.grad(loss))(arguments[0], keys[i], counts[i], arguments[3])
        np.testing.assert_allclose(mapped[i], one, rtol=1e-8)


def test_captured_values_inside_scan():
    p = problems.tanh(norm=0.6)

    def total(W, shifts):
        def body(carry, shift):
            s = jdeq.deq(
                lambda _, z, x: jnp.tanh(z @ W.T + x + shift + carry), None, p.x, p.z0, **TIGHT
            )
            return jnp.sum(s.value) / 100, None

        return jax.lax.scan(body, 0.0, shifts)[0]

    def unrolled(W, shifts):
        carry = 0.0
        for shift in shifts:
            s = jdeq.deq(
                p.cell, {"W": W, "U": jnp.eye(problems.N), "b": shift + carry}, p.x, p.z0, **TIGHT
            )
            carry = jnp.sum(s.value) / 100
        return carry

    arguments = (p.params["W"], jnp.array([0.0, 0.3]))
    got = jax.jit(jax.grad(total, (0, 1)))(*arguments)
    assert_trees_close(got, jax.jit(jax.grad(unrolled, (0, 1)))(*arguments))


def test_second_derivatives_through_a_capture():
    def z(x):
        return jdeq.fixed_point(
            lambda _, z: jnp.sqrt(z + x), None, jnp.ones((1, 1)), **TIGHT
        ).value[0, 0]

    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(z)))(2.0), -2 * 9**-1.5, rtol=1e-8)


def test_input_value_sees_what_cell_objective_and_project_capture():
    """Regression: the radius that a projection used had a gradient of zero."""
    o = problems.optimum("ball")

    @jax.jit
    def captured(W, weight, radius):
        params = {**o.params, "W": W, "weight": weight}
        problem = jdeq.InputProblem(
            lambda _, z, x: problems.linear_cell(params, z, x),
            lambda _, z, x, target: problems.quadratic(params, z, x, target),
            lambda x: jdeq.projections.l2_ball(x, radius),
        )
        values, _ = jdeq.input_value(
            problem, None, o.target, o.x0, o.z0, rtol=1e-11, atol=0.0, max_steps=2000
        )
        return jnp.sum(values)

    at = (o.params["W"], o.params["weight"], o.data["radius"])
    gradient = jax.jit(jax.grad(captured, (0, 1, 2)))(*at)
    for i in range(3):
        direction = jnp.ones_like(at[i])

        def moved(t, i=i, direction=direction):
            return captured(*at[:i], at[i] + t * direction, *at[i + 1 :])

        want = problems.central_difference(moved)
        assert abs(jnp.sum(gradient[i]) - want) <= 1e-6 * abs(want)
    assert np.all(gradient[2][:2] < 0)
    assert abs(gradient[2][2]) < 1e-12  # the third ball is larger than it need be


def test_joint_solve_hoists_from_all_three_functions():
    o = problems.optimum("ball")

    @jax.jit
    def captured(W, scale, radius, sign):
        params = {**o.params, "W": W, "scale": scale}
        problem = jdeq.InputProblem(
            lambda _, z, x: problems.linear_cell(params, z, x * sign),
            lambda _, z, x, target: problems.quadratic(params, z, x, target),
            lambda x: jdeq.projections.l2_ball(x, radius),
        )
        return jdeq.joint_solve(
            problem, None, o.target, o.x0, o.z0, rtol=1e-9, max_steps=2000
        ).value

    value = captured(o.params["W"], 2.0, o.data["radius"], jnp.asarray(-1))
    np.testing.assert_allclose(value.x, -o.x, atol=1e-7)
    np.testing.assert_allclose(value.z, o.z, atol=1e-7)

    def loss(W):
        return jnp.sum(jnp.sin(captured(W, 2.0, o.data["radius"], jnp.asarray(1)).z))

    def held(W):
        return jnp.sum(
            jnp.sin(jnp.linalg.solve(jnp.eye(problems.N) - W, (o.x @ o.params["U"].T).T))
        )

    np.testing.assert_allclose(
        jax.grad(loss)(o.params["W"]), jax.grad(held)(o.params["W"]), rtol=1e-5
    )
