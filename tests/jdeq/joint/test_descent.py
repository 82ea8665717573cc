from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.joint import Descent
from jdeq.solution import Result
from tests.jdeq import problems


def test_takes_steps_from_the_newest_state_and_adjoint():
    """The formulas of the docstring, replayed by hand on a linear problem."""
    o = problems.optimum("box")
    method = Descent(optax.sgd(0.1), state_relaxation=0.8, adjoint_relaxation=0.6)
    s = jdeq.joint_solve(
        *o.arguments, method=method, max_steps=11, rtol=1e-13, history=lambda state: state
    )
    W, U, t = (np.asarray(v) for v in (o.params["W"], o.params["U"], o.target))
    z, x, pulled = (np.asarray(v) for v in (o.z0, o.x0, o.z0))
    for k in range(10):
        ahead = z + 0.8 * (z @ W.T + x @ U.T - z)
        mu = pulled + ahead - t
        np.testing.assert_allclose(s.history.record.z[k], z, atol=1e-12)
        np.testing.assert_allclose(s.history.record.x[k], x, atol=1e-12)
        np.testing.assert_allclose(s.history.record.mu[k], mu, atol=1e-12)
        g = mu @ U + problems.WEIGHT * x
        z, pulled = ahead, pulled + 0.6 * (mu @ W - pulled)
        x = np.clip(x - 0.1 * g, -0.2, 0.3)


def test_over_relaxation_follows_faster_where_eigenvalues_are_positive():
    o = problems.optimum()
    params = {**o.params, "W": 0.8 * jnp.eye(problems.N)}
    problem = jdeq.InputProblem(problems.linear_cell, problems.quadratic)

    def steps(relaxation):
        method = Descent(
            optax.sgd(0.02), state_relaxation=relaxation, adjoint_relaxation=relaxation
        )
        solution = jdeq.joint_solve(
            problem, params, o.target, o.x0, o.z0, method=method, max_steps=2000, rtol=1e-8
        )
        assert np.all(solution.result == Result.converged)
        return np.asarray(solution.steps)

    assert np.all(steps(1.6) < 0.8 * steps(1.0))


def test_without_feedback_x_takes_the_steps_of_exact_gradients():
    """A cell that ignores z is an explicit network: nothing is left to lag behind x."""
    o = problems.optimum()

    def explicit(params, z, x):
        return jnp.tanh(x @ params["U"].T)

    problem = jdeq.InputProblem(explicit, problems.quadratic)
    optimizer = optax.adam(0.1)
    s = jdeq.joint_solve(
        problem, o.params, o.target, o.x0, o.z0, method=Descent(optimizer), max_steps=20,
        rtol=0.0, atol=0.0, history=lambda state: state.x,
    )  # fmt: skip

    def loss(x):
        return jnp.sum(problems.quadratic(o.params, explicit(o.params, None, x), x, o.target))

    x, memory = o.x0, optimizer.init(o.x0)
    for k in range(19):
        np.testing.assert_allclose(s.history.record[k], x, atol=1e-12)
        updates, memory = optimizer.update(jax.grad(loss)(x), memory)
        x = optax.apply_updates(x, updates)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 400])
def test_what_is_reported_is_measured_at_what_is_returned(steps, warm):
    """Residuals and objective, of a converged solve and of one cut short."""
    o = problems.optimum("box")
    mu0 = jnp.cos(jnp.arange(o.z0.size, dtype=o.z0.dtype)).reshape(o.z0.shape) if warm else None
    s = jdeq.joint_solve(
        *o.arguments, method=Descent(optax.sgd(0.1)), max_steps=steps, rtol=1e-6, mu0=mu0
    )
    assert np.all(s.result == (Result.converged if steps == 400 else Result.max_steps))
    z, x, mu = s.value
    _, pull_back = jax.vjp(lambda z, x: problems.linear_cell(o.params, z, x), z, x)
    objective, slopes = jax.vjp(lambda z, x: problems.quadratic(o.params, z, x, o.target), z, x)
    (jz, jx), (lz, lx) = pull_back(mu), slopes(jnp.ones_like(objective))
    start = problems.quadratic(o.params, o.z0, o.x0, o.target)
    size = 1 + jnp.linalg.norm(x, axis=1)
    scale = size**2 / (jnp.abs(start) + jnp.abs(objective))
    moved = jnp.clip(x - scale[:, None] * (jx + lx), -0.2, 0.3)
    want = jdeq.KKTResidual(
        jnp.linalg.norm(problems.linear_cell(o.params, z, x) - z, axis=1),
        jnp.linalg.norm(jz + lz - mu, axis=1),
        jnp.linalg.norm(moved - x, axis=1) / size,
    )
    for got, value in zip(s.residual, want, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(s.aux.objective, objective, rtol=1e-12)


def test_a_solve_that_starts_at_its_solution_takes_one_step():
    o = problems.optimum("box")
    found = jdeq.joint_solve(*o.arguments, rtol=1e-8, max_steps=1000).value
    s = jdeq.joint_solve(
        o.problem, o.params, o.target, found.x, found.z, mu0=found.mu, method=Descent(), rtol=1e-7
    )
    assert np.all(s.result == Result.converged)
    assert np.all(s.steps == 1)


OPTIMISERS = {
    "adam": optax.adam(optax.cosine_decay_schedule(0.1, 400)),
    "nesterov": optax.sgd(0.05, 0.8, nesterov=True),
    "rmsprop": optax.rmsprop(optax.exponential_decay(0.05, 40, 0.5)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.5), optax.scale(-0.1)),
    "decayed": optax.chain(
        optax.normalize_by_update_norm(), optax.sgd(optax.exponential_decay(0.1, 20, 0.7))
    ),
    "lion": optax.lion(optax.exponential_decay(0.05, 30, 0.5)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_takes_any_optax_optimiser(name):
    o = problems.optimum()
    s = jdeq.joint_solve(*o.arguments, method=Descent(OPTIMISERS[name]), max_steps=400, rtol=1e-9)
    assert np.all(s.result != Result.non_finite)
    np.testing.assert_allclose(s.aux.objective, o.objective, rtol=2e-3)


def test_optimisers_are_mapped_over_problems():
    """Problems of a batch move as they do alone, also where the optimiser takes norms."""
    o = problems.optimum()
    scales = jnp.array([1.0, 1e4, 1e-2])
    target = scales[:, None] * o.target
    method = Descent(OPTIMISERS["chain"])
    options = {"method": method, "max_steps": 20, "rtol": 1e-12, "history": lambda state: state.x}
    batch = jdeq.joint_solve(o.problem, o.params, target, o.x0, o.z0, **options)
    for i in range(problems.B):
        one = slice(i, i + 1)
        alone = jdeq.joint_solve(o.problem, o.params, target[one], o.x0[one], o.z0[one], **options)
        np.testing.assert_allclose(
            alone.history.record[:, 0], batch.history.record[:, i], rtol=1e-9, atol=1e-12
        )


def test_the_default_optimiser_takes_steps_free_of_the_objectives_units():
    def run(scale):
        o = problems.optimum(scale=scale)
        return jdeq.joint_solve(
            *o.arguments,
            method=Descent(),
            max_steps=50,
            rtol=1e-12,
            atol=0.0,
            history=lambda state: state.x,
        ).history.record

    reference = run(1.0)
    for scale in (1e-8, 1e8):
        np.testing.assert_allclose(run(scale), reference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 40])
def test_the_default_schedule_spans_max_steps(steps):
    """From ``step_size`` to a fiftieth of it: read off the steps on a constant slope."""
    size = 0.3

    def objective(params, z, x, target):
        return jnp.sum(x, 1) + 0 * jnp.sum(z, 1)

    problem = jdeq.InputProblem(lambda p, z, x: 0 * z, objective)
    zeros = jnp.zeros((1, 2))
    s = jdeq.joint_solve(
        problem,
        None,
        zeros,
        zeros,
        zeros,
        method=Descent(step_size=size),
        max_steps=steps,
        rtol=0.0,
        atol=0.0,
        history=lambda state: state.x,
    )
    moved = -np.diff(s.history.record[:, 0, 0])
    k = np.arange(steps - 2)  # the last step only measures
    decay = 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * k / steps))
    np.testing.assert_allclose(moved[:-1], size * decay, rtol=1e-6)


def test_a_bare_optimiser_sees_gradients_of_each_problems_own_loss():
    """Not of their sum over the batch, nor of their mean."""
    o = problems.optimum()
    seen = []

    def update(g, state, x=None):
        jax.debug.callback(lambda g: seen.append(np.asarray(g)), g, ordered=False)
        return jax.tree.map(jnp.zeros_like, g), state

    method = Descent(optax.GradientTransformation(lambda x: (), update))
    x0 = o.x0 + 0.5
    jdeq.joint_solve(o.problem, o.params, o.target, x0, o.z0, method=method, max_steps=1)
    jax.effects_barrier()
    got = np.array(sorted(np.ravel(seen)))
    np.testing.assert_allclose(got, np.sort(np.ravel(problems.WEIGHT * x0)))
