"""The speed measurement: true objectives, targets, misses, tuning, and who is timed for what."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from experiments.common import speed
from tests.experiments.common import linear


def test_objectives_are_those_at_the_equilibrium():
    at = linear.problems(0)
    inputs = jax.random.normal(jax.random.key(5), (4, linear.COUNT, linear.INPUT))
    found = speed.objectives(linear.PROBLEM, at, inputs)
    expected = jnp.stack([linear.value(at, x) for x in inputs])
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_an_input_without_an_equilibrium_has_no_objective():
    at = linear.problems(0)
    growing = at.params | {"A": 1.5 * jnp.eye(linear.STATE)}
    inputs = jnp.ones((1, linear.COUNT, linear.INPUT))
    problem = jdeq.InputProblem(
        lambda params, z, x: jnp.sin(20 * linear.cell(params, z, x)), linear.objective
    )
    assert np.isinf(speed.objectives(problem, at._replace(params=growing), inputs)).all()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that only scripted candidates advance: a busy machine must not fail a test."""
    Scripted.now = 0.0
    monkeypatch.setattr(speed.time, "perf_counter", lambda: Scripted.now)


class Scripted:
    """A candidate whose iterates and times are given: x_k = start (1 - progress[k])."""

    now = 0.0

    def __init__(self, name, progress, seconds_a_step):
        self.progress = jnp.asarray(progress)
        self.seconds_a_step = seconds_a_step
        self.candidate = speed.Candidate(name, self.solve, len(progress))

    def solve(self, problem, at, budget):
        Scripted.now += self.seconds_a_step * int(budget)
        x = at.x0[None] * (1 - self.progress)[:, :, None]
        history = jdeq.History({}, jnp.zeros(()), x)
        zeros = jnp.zeros(linear.COUNT)
        return jdeq.Solution(x, zeros, zeros, zeros, history)


def quadratic():
    """f(x) = ||x||^2 from x0 = (1, 0, 0) in every problem; the state plays no part."""
    problem = jdeq.InputProblem(
        lambda params, z, x: 0.5 * z, lambda params, z, x, target: jnp.sum(x**2, axis=-1)
    )
    x0 = jnp.zeros((linear.COUNT, linear.INPUT)).at[:, 0].set(1.0)
    zeros = jnp.ones((linear.COUNT, linear.STATE))
    return problem, speed.Problems({}, zeros, x0, zeros)


def progress(arrivals, steps):
    """Each problem stays at the start, and is at the optimum from its arrival on."""
    return (np.arange(steps)[:, None] >= np.asarray(arrivals)[None, :]).astype(np.float32)


def test_times_targets_and_misses():
    problem, at = quadratic()
    never = 10**6
    joint = Scripted("joint", progress([3, 3, 3, 3, 5, 5, 5, never], 9), 0.004)
    nested = Scripted("nested", progress([3, 3, 3, 3, 3, 3, never, 3], 9), 0.012)
    published = Scripted("published", progress([never] * 8, 9), 0.03)
    outcome = speed.compare(
        problem, at, at, [joint.candidate], [nested.candidate], published.candidate
    )
    # Row k is returned by a budget of k + 1 steps.
    ratios = outcome.speedup(outcome.nested)
    np.testing.assert_allclose(ratios[:4], 3.0, rtol=1e-6)
    np.testing.assert_allclose(ratios[4:6], 3 * 4 / 6, rtol=1e-6)
    assert math.isinf(ratios[6])
    assert ratios[7] == 0
    summary = outcome.summary()
    assert summary["speedup_nested"] == pytest.approx(3)
    assert summary["share_joint_reached"] == 7 / 8
    assert summary["share_nested_reached"] == 7 / 8
    assert summary["share_published_reached"] == 0
    assert math.isinf(summary["speedup_published"])
    expected = 9 * 0.03 / (6 * 0.004)
    assert summary["speedup_published_at_least"] == pytest.approx(expected)
    seconds, gap = outcome.gaps()["joint"]
    assert gap[0].tolist() == [1.0] * 8
    assert gap[-1, :7].tolist() == [0.0] * 7
    assert (np.diff(seconds) >= 0).all()


def test_problems_without_an_equilibrium_at_the_start_count_against_joint(capsys):
    problem, at = quadratic()

    def cell(params, z, x):
        # Where x is at the start of the last problem, z jumps about for ever.
        return jnp.where(x[:, :1] == 2.0, jnp.sin(50 * jnp.cumsum(z, axis=1) + 1), 0.5 * z)

    stuck = jdeq.InputProblem(cell, problem.objective)
    at = at._replace(x0=at.x0.at[-1, 0].set(2.0))
    joint, nested, published = (
        Scripted(name, progress([2] * 8, 5), 0.002).candidate for name in "abc"
    )
    outcome = speed.compare(stuck, at, at, [joint], [nested], published)
    assert "no equilibrium at the start" in capsys.readouterr().err
    assert outcome.joint.share_reached == 7 / 8
    assert outcome.speedup(outcome.nested)[-1] == 0
    assert np.isfinite(outcome.speedup(outcome.nested)[:-1]).all()


def test_iterates_that_a_full_run_makes_but_does_not_return_are_not_reached():
    problem, at = quadratic()
    late = Scripted("late", progress([4, 4, 4, 4, 5, 5, 5, 5], 6), 0.004).candidate
    sure = Scripted("sure", progress([2] * 8, 6), 0.004).candidate
    # Six iterations return x_0 to x_4: a sixth looks at x_4, and x_5 would want a seventh.
    late = dataclasses.replace(late, delay=2)
    outcome = speed.compare(problem, at, at, [late], [sure], sure)
    np.testing.assert_allclose(outcome.joint.reached, [6 * 0.004] * 4 + [np.inf] * 4)
    assert outcome.nested.share_reached == 1


def test_one_percent_of_the_way_is_near_enough():
    problem, at = quadratic()
    almost = progress([2] * 8, 5) * (1 - 0.0999)  # f = 0.0998^2 < 0.01
    short = progress([2] * 8, 5) * (1 - 0.1001)
    perfect = Scripted("published", progress([2] * 8, 5), 0.001)
    outcome = speed.compare(
        problem,
        at,
        at,
        [Scripted("joint", almost, 0.001).candidate],
        [Scripted("nested", short, 0.001).candidate],
        perfect.candidate,
    )
    assert outcome.joint.share_reached == 1
    assert outcome.nested.share_reached == 0


def test_tuning_takes_the_fastest_for_nested_and_a_reliable_one_for_joint():
    problem, at = quadratic()
    never = 10**6
    shaky = Scripted("shaky", progress([1, 1, 1, 1, 1, 1, 1, never], 6), 0.004)
    sure = Scripted("sure", progress([2] * 8, 6), 0.004)
    wasteful = Scripted("wasteful", progress([2] * 8, 6), 0.02)
    candidates = [wasteful.candidate, sure.candidate, shaky.candidate]
    outcome = speed.compare(problem, at, at, candidates, candidates, wasteful.candidate)
    assert outcome.joint.name == "sure"
    assert outcome.nested.name == "shaky"


def test_fewer_problems_are_repeated_to_as_many_as_the_others():
    _, at = quadratic()
    few = at._replace(
        target=at.target[:3], x0=jnp.arange(9.0).reshape(3, 3), z0=at.z0[:3], data=None
    )
    repeated = few.repeated(at)
    assert repeated.target.shape == at.target.shape
    np.testing.assert_array_equal(repeated.x0[:7:3], few.x0[:1].repeat(3, 0))
    assert repeated.params is few.params
    assert at.repeated(few) is at


def test_the_real_methods_reach_the_closed_form_optimum():
    validation, test = linear.problems(0), linear.problems(1)
    method = jdeq.joint.Descent(optax.adam(1.0, b1=0.8, b2=0.95, eps=1e-20))
    outcome = speed.compare(
        linear.PROBLEM,
        validation,
        test,
        [speed.joint_candidate("joint", method, 150, (0.03, 0.1))],
        [speed.nested_candidate("nested", optax.adam(1.0), 100, (0.1, 0.3))],
        speed.published_candidate(optax.adam(1.0), 50),
    )
    state_of = jnp.linalg.solve(jnp.eye(linear.STATE) - test.params["A"], test.params["B"])
    hessian = state_of.T @ state_of + 0.01 * jnp.eye(linear.INPUT)
    best = linear.value(test, jnp.linalg.solve(hessian, state_of.T @ test.target.T).T)
    found = np.minimum(outcome.joint.objectives.min(0), outcome.nested.objectives.min(0))
    np.testing.assert_allclose(found, best, rtol=1e-3)
    assert outcome.joint.share_reached == 1
    assert outcome.nested.share_reached == 1
    assert "rate" in outcome.joint.name
