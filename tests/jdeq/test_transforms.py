"""jit, vmap, grad, scan, and how often anything is compiled."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.adjoints import Implicit, StateImplicit
from jdeq.joint import Accelerated, Descent, InnerSolve, Polished
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems

TIGHT = {"rtol": 1e-12, "atol": 0.0}


@pytest.fixture
def compilations():
    """A context manager that counts the programs compiled within it."""
    count = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            count.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)

    @contextlib.contextmanager
    def counting():
        count.clear()
        yield count

    yield counting
    unregister = getattr(jax.monitoring, "unregister_event_duration_listener", None)
    if unregister is None:
        from jax._src.monitoring import (
            _unregister_event_duration_listener_by_callback as unregister,
        )
    unregister(listen)


def outer_loss(value):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(value))


@pytest.fixture(scope="module")
def losses():
    """Scalar losses of the differentiable entry points, of (params, x), on two small problems."""
    jax.config.update("jax_enable_x64", True)
    e, o = problems.tanh(norm=0.6), problems.optimum()
    quick = {"method": Descent(optax.sgd(0.05)), "rtol": 1e-11, "max_steps": 2000}

    def of_deq(params, x):
        return outer_loss(jdeq.deq(e.cell, params, x, e.z0, **TIGHT).value)

    def of_joint(params, target):
        s = jdeq.joint_solve(o.problem, params, target, o.x0, o.z0, **quick)
        return outer_loss(s.value.z)

    def of_value(params, target):
        return jnp.sum(jdeq.input_value(o.problem, params, target, o.x0, o.z0, **quick)[0])

    return {
        "deq": (of_deq, e.params, e.x),
        "joint_solve": (of_joint, o.params, o.target),
        "input_value": (of_value, o.params, o.target),
    }


ENTRIES = ["deq", "joint_solve", "input_value"]


def assert_trees_close(got, want, **tolerance):
    tolerance = {"rtol": 1e-8, "atol": 1e-10, **tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


@pytest.mark.parametrize("entry", ENTRIES)
def test_gradients_under_jit_vmap_and_scan_agree(losses, entry):
    loss, params, x = losses[entry]
    argument = 0 if entry == "joint_solve" else 1  # x is held in the joint solve
    several = jnp.stack([x, 0.5 * x])
    one_by_one = [jax.value_and_grad(loss, argument)(params, row) for row in several]  # eager
    values = jnp.stack([v for v, _ in one_by_one])
    gradients = jax.tree.map(lambda *g: jnp.stack(g), *[g for _, g in one_by_one])

    assert all(
        jnp.any(leaf) for leaf in jax.tree.leaves(gradients["W"] if argument == 0 else gradients)
    )

    inside = jax.jit(jax.value_and_grad(loss, argument))(params, several[1])
    assert_trees_close(inside, one_by_one[1])

    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss, argument), (None, 0)))(params, several)
    assert_trees_close(mapped, (values, gradients))

    def scanned(params, several):
        def body(total, row):
            return total + loss(params, row), row[0, 0]

        return jax.lax.scan(body, 0.0, several)[0]

    value, gradient = jax.jit(jax.value_and_grad(scanned, argument))(params, several)
    want = jax.tree.map(lambda g: jnp.sum(g, 0), gradients) if argument == 0 else gradients
    assert_trees_close(value, jnp.sum(values))
    assert_trees_close(gradient, want)


def test_vmap_over_params_solves_each_on_its_own():
    e = problems.tanh(norm=0.6)
    factors = jnp.array([0.5, 1.0, 1.5])
    params = jax.tree.map(lambda v: factors.reshape(-1, *[1] * v.ndim) * v, e.params)

    @jax.jit
    def run(params):
        return jdeq.deq(e.cell, params, e.x, e.z0, history=True)

    mapped = jax.jit(jax.vmap(run))(params)
    for i in range(3):
        alone = run(jax.tree.map(lambda v, i=i: v[i], params))
        row = jax.tree.map(lambda v, i=i: v[i], mapped)
        np.testing.assert_array_equal(row.steps, alone.steps)
        np.testing.assert_array_equal(row.result, alone.result)
        np.testing.assert_allclose(row.value, alone.value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(row.history.residual, alone.history.residual, atol=1e-12)


def test_vmap_over_joint_solves_keeps_their_outcomes():
    o = problems.optimum("ball")
    targets = jnp.stack([o.target, 3 * o.target])

    @jax.jit
    def run(target):
        return jdeq.joint_solve(o.problem, o.params, target, o.x0, o.z0, data=o.data)

    mapped = jax.jit(jax.vmap(run))(targets)
    for i in range(2):
        alone = run(targets[i])
        np.testing.assert_array_equal(mapped.steps[i], alone.steps)
        np.testing.assert_allclose(mapped.value.x[i], alone.value.x, rtol=1e-7, atol=1e-9)


def test_scan_carries_a_solution_on_as_a_warm_start():
    e = problems.tanh(norm=0.9)

    @jax.jit
    def run(z0):
        def body(z, x):
            s = jdeq.deq(e.cell, e.params, x, z)
            return s.value, s.steps

        return jax.lax.scan(body, z0, jnp.stack([e.x, e.x, 1.001 * e.x]))

    _, steps = run(e.z0)
    assert np.all(steps[1] == 1)
    assert np.all((steps[2] > 1) & (steps[2] < steps[0]))


def test_gradient_reaches_through_two_chained_equilibria():
    e = problems.tanh(norm=0.6)

    def chained(x):
        first = jdeq.deq(e.cell, e.params, x, e.z0, **TIGHT).value
        return outer_loss(jdeq.deq(e.cell, e.params, first, e.z0, **TIGHT).value)

    direction = jnp.array(np.random.default_rng(0).normal(size=e.x.shape))
    want = problems.central_difference(lambda t: chained(e.x + t * direction))
    got = jnp.vdot(jax.jit(jax.grad(chained))(e.x), direction)
    np.testing.assert_allclose(got, want, rtol=1e-8)


class TestCompilations:
    """The second call with the same functions, options and shapes compiles nothing."""

    def test_deq_and_its_gradient(self, compilations):
        e = problems.tanh()
        other = jax.block_until_ready(1.1 * e.x)

        def call(x, rtol):
            # Options are built anew on every call, as users do, and hash by value.
            options = {"solver": Anderson(window=3), "adjoint": Implicit(solver=Picard())}

            def loss(x):
                s = jdeq.deq(e.cell, e.params, x, e.z0, rtol=rtol, max_steps=30, **options)
                return jnp.sum(s.value)

            return jax.value_and_grad(loss)(x)

        with compilations() as count:
            call(e.x, 1e-4)
            assert count  # the listener works
        with compilations() as count:
            call(other, 1e-6)
            assert not count

    def test_joint_solve_input_value_and_nested_solve(self, compilations):
        o = problems.optimum()
        other = jax.block_until_ready(1.1 * o.target)
        adam = optax.adam(0.1)

        def call(target, rtol):
            problem = jdeq.InputProblem(problems.linear_cell, problems.quadratic)
            rest = (target, o.x0, o.z0)
            polish = {"method": Polished(descent=Descent(step_size=0.2)), "rtol": rtol}
            jdeq.input_value(problem, o.params, *rest, **polish)
            adjoint = StateImplicit(max_steps=7)
            descent = {"method": Descent(adam), "adjoint": adjoint, "rtol": rtol, "max_steps": 5}
            jdeq.joint_solve(problem, o.params, *rest, **descent)
            mixing = {"method": Accelerated(Anderson(window=3)), "rtol": rtol, "max_steps": 5}
            jdeq.joint_solve(problem, o.params, *rest, **mixing)
            inner = InnerSolve(max_steps=9)
            jdeq.nested_solve(problem, o.params, *rest, forward=inner, rtol=rtol, max_steps=5)

        with compilations() as count:
            call(o.target, 1e-4)
            assert count
        with compilations() as count:
            call(other, 1e-6)
            assert not count

    def test_a_budget_changes_without_compiling(self, compilations):
        o = problems.optimum()

        def call(budget):
            return jdeq.joint_solve(*o.arguments, step_budget=budget, max_steps=30).steps

        call(5)
        with compilations() as count:
            steps = call(8)
            assert not count
        assert steps.tolist() == [8] * problems.B

    def test_jit_traces_once(self):
        e = problems.tanh()
        traces = []

        @jax.jit
        def run(x):
            traces.append(x)
            return jdeq.deq(e.cell, e.params, x, e.z0).value

        run(e.x)
        run(1.1 * e.x)
        assert len(traces) == 1


def test_forward_mode_is_refused_by_jax():
    """custom_vjp's own error, and not a wrong number."""
    e = problems.tanh()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: jdeq.deq(e.cell, e.params, x, e.z0).value, (e.x,), (e.x,))
