from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

import jdeq
from jdeq.joint import Accelerated, Descent
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems


def test_under_picard_it_is_plain_descent():
    o = problems.optimum("box")
    options = {"max_steps": 30, "rtol": 1e-12, "history": lambda state: state}
    relaxation = {"state_relaxation": 0.8, "adjoint_relaxation": 0.6}
    plain = Descent(optax.sgd(0.1), **relaxation)
    mixed = Accelerated(Picard(), 0.1, **relaxation)
    want = jdeq.joint_solve(*o.arguments, method=plain, **options).history.record
    got = jdeq.joint_solve(*o.arguments, method=mixed, **options).history.record
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_anderson_solves_a_linear_kkt_system_in_as_many_steps_as_it_has_dimensions():
    o = problems.optimum()
    dimension = 2 * problems.N + problems.M
    method = Accelerated(Anderson(window=dimension, regularization=0.0), step_size=0.1)
    s = jdeq.joint_solve(*o.arguments, method=method, rtol=1e-6, max_steps=100)
    assert np.all(s.result == Result.converged)
    assert np.all(s.steps <= dimension + 3)


def test_the_published_window_beats_no_window():
    o = problems.optimum()
    mixed = jdeq.joint_solve(*o.arguments, method=Accelerated(), rtol=1e-6, max_steps=2000)
    plain = jdeq.joint_solve(*o.arguments, method=Accelerated(Picard()), rtol=1e-6, max_steps=2000)
    assert np.all(mixed.result == Result.converged)
    assert np.all(3 * mixed.steps < plain.steps)


def test_the_step_size_may_follow_a_schedule():
    o = problems.optimum()
    schedule = optax.piecewise_constant_schedule(0.2, {5: 0.25})
    options = {"max_steps": 12, "rtol": 1e-12, "history": lambda state: state.x}
    want = jdeq.joint_solve(
        *o.arguments,
        method=Descent(optax.sgd(schedule), state_relaxation=0.8, adjoint_relaxation=0.6),
        **options,
    )
    got = jdeq.joint_solve(*o.arguments, method=Accelerated(Picard(), schedule), **options)
    np.testing.assert_allclose(got.history.record, want.history.record, rtol=1e-9, atol=1e-12)


def test_mixtures_are_projected_again():
    """Anderson extrapolates out of the ball, the published code's flaw."""
    o = problems.optimum("ball")
    s = jdeq.joint_solve(
        o.problem,
        o.params,
        20 * o.target,
        o.x0,
        o.z0,
        data=o.data,
        method=Accelerated(step_size=0.5),
        max_steps=40,
        rtol=1e-12,
        history=lambda state: jnp.linalg.norm(state.x, axis=1),
    )
    assert np.all(s.history.record <= o.data["radius"] * (1 + 1e-12))
