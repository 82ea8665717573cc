"""The published method, against a transcription in numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.joint import Accelerated, published
from jdeq.solution import Result
from jdeq.solvers import Picard
from tests.jdeq import problems

N, M = problems.N, problems.M


def bent_cell(params, z, x):
    return jnp.tanh(z @ params["W"].T + x @ params["U"].T)


def penalised_distance(params, z, x, target):
    return jnp.sum((z - target) ** 2, axis=1) + 0.1 * jnp.sum(x**4, axis=1)


def into_ball(x):
    return jdeq.projections.l2_ball(x, 0.5)


FREE = jdeq.InputProblem(bent_cell, penalised_distance)
BALL = jdeq.InputProblem(bent_cell, penalised_distance, into_ball)


def given(seed=0):
    rng = np.random.default_rng(seed)
    W, U = problems.matrix(rng, N, N, 0.6), problems.matrix(rng, N, M, 1.0)
    target = 0.5 * rng.normal(size=(problems.B, N))
    return W, U, target


def project(x, radius):
    return x if radius is None else x * radius / max(radius, np.linalg.norm(x))


def relaxed_image(s, W, U, target, step, normalize, radius):
    """The published map of one problem's concatenated (z, x, mu)."""
    z, x, mu = s[:N], s[N : N + M], s[N + M :]
    f = np.tanh(W @ z + U @ x)
    through = mu * (1 - f**2)
    adjoint = W.T @ through + 2 * (z - target)
    g = U.T @ through + 0.4 * x**3
    if normalize and np.linalg.norm(g) > 0:
        g = g / np.linalg.norm(g)
    return np.concatenate(
        [z + 0.8 * (f - z), project(x - step * g, radius), mu + 0.6 * (adjoint - mu)]
    )


def transcription(W, U, target, steps, points, kind, rates, normalize, radius):
    """Iterates of one problem: two plain evaluations, then bordered systems for the weights."""
    switch = max(50, int(steps * 5 / 8))
    iterates, images = [], []
    s = np.zeros(2 * N + M)
    for count in range(1, steps + 1):
        step = rates[0] if count < switch else rates[1]
        iterates.append(s)
        images.append(relaxed_image(s, W, U, target, step, normalize, radius))
        s = images[-1]
        if count >= 2:
            X, F = np.array(iterates[-points:]), np.array(images[-points:])
            G = F - X
            H = (X if kind == "I" else G) @ G.T
            n = len(X)
            # Rows are differenced by hand: bordered as published, the system is the same, but
            # loses the digits that this test looks at.
            rows = np.concatenate([H[1:] - H[:-1], np.ones((1, n))])
            scale = np.abs(rows).max(axis=1)
            alpha = np.linalg.solve(rows / scale[:, None], np.eye(n)[-1] / scale[-1])
            s = alpha @ F
            s[N : N + M] = project(s[N : N + M], radius)
    return np.array(iterates)


CASES = {
    "mnist": (20, "I", (0.6, 0.2), True),
    "cifar10": (20, "I", (0.1, 0.1), True),
    "celeba": (40, "I", (0.01, 0.003), False),
    "omniglot": (10, "II", (0.04, 0.01), False),
}


def solve(problem, W, U, target, options):
    return jdeq.joint_solve(
        problem,
        {"W": jnp.array(W), "U": jnp.array(U)},
        jnp.array(target),
        jnp.zeros((problems.B, M)),
        jnp.zeros((problems.B, N)),
        history=lambda state: jnp.concatenate(state, axis=1),
        **options,
    )


@pytest.mark.parametrize("problem", [FREE, BALL], ids=["free", "ball"])
@pytest.mark.parametrize("task", CASES)
def test_iterates_are_those_of_the_published_method(task, problem):
    """Twelve evaluations: later ones amplify rounding in systems that become singular."""
    W, U, target = given()
    solution = solve(problem, W, U, target, published(task, max_steps=12))
    radius = 0.5 if problem is BALL else None
    for b in range(problems.B):
        want = transcription(W, U, target[b], 12, *CASES[task], radius)
        np.testing.assert_allclose(solution.history.record[:, b], want, rtol=1e-5, atol=1e-7)


def test_the_step_switches_in_the_published_evaluation():
    """A window of one is the map alone, which can be followed past the switch."""
    W, U, target = given()
    options = published("celeba", max_steps=60)
    options["method"] = dataclasses.replace(options["method"], solver=Picard())
    solution = solve(FREE, W, U, target, options)
    for b in range(problems.B):
        want = transcription(W, U, target[b], 60, 1, "I", (0.01, 0.003), False, None)
        np.testing.assert_allclose(solution.history.record[:, b], want, rtol=1e-9, atol=1e-12)


def test_all_evaluations_are_spent_and_mixing_pays():
    """The published setting as a whole on the problem with a known optimum."""
    o = problems.optimum()
    solution = jdeq.joint_solve(*o.arguments, **published("omniglot"))
    assert np.all(solution.result == Result.max_steps)
    assert np.all(solution.steps == 100)
    assert problems.relative_error(solution.value.x, o.x) < 1e-6


def test_equal_presets_are_one_program():
    assert published("mnist")["method"] == published("mnist")["method"]
    assert hash(published("mnist")["method"]) == hash(published("mnist")["method"])


def test_bad_options():
    with pytest.raises(ValueError, match="'imagenet' was given"):
        published("imagenet")
    with pytest.raises(ValueError, match="max_steps=0"):
        published("mnist", max_steps=0)
    with pytest.raises(TypeError, match="normalize=1"):
        Accelerated(normalize=1)
