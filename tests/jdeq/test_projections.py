"""Each projection is feasible, idempotent, and nearest: ``(x - P x) . (y - P x) <= 0``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdeq import projections

B, N = 5, 4
RADIUS = np.array([0.3, 1.0, 2.0, 0.0, 100.0])

SETS = {
    "l2_ball": (
        lambda x: projections.l2_ball(x, jnp.array(RADIUS)),
        lambda x: np.linalg.norm(x, axis=1) - RADIUS,
    ),
    "linf_ball": (
        lambda x: projections.linf_ball(x, jnp.array(RADIUS)),
        lambda x: np.max(np.abs(x), axis=1) - RADIUS,
    ),
    "box": (
        lambda x: projections.box(x, -0.5, 1.0),
        lambda x: np.max(np.maximum(x - 1.0, -0.5 - x), axis=1),
    ),
    "simplex": (
        lambda x: projections.simplex(x, 2.0),
        lambda x: np.maximum(np.max(-x, axis=1), np.abs(np.sum(x, axis=1) - 2.0)),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_projects_each_problem_on_its_own_set(name):
    project, excess = SETS[name]
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 10.0):
        x = scale * rng.normal(size=(B, N))
        p = np.asarray(project(jnp.array(x)))
        assert np.all(excess(p) <= 1e-12)
        np.testing.assert_allclose(project(jnp.array(p)), p, atol=1e-12)
        inside = np.asarray(project(jnp.array(scale * rng.normal(size=(B, N)))))
        assert np.all(np.sum((x - p) * (inside - p), axis=1) <= 1e-9)
        alone = project(jnp.array(np.where(np.arange(B)[:, None] == 1, x, 0.0)))
        np.testing.assert_allclose(alone[1], p[1])


def test_the_norm_runs_over_all_leaves():
    x = {"a": jnp.full((2, 1), 3.0), "b": jnp.full((2, 2, 2), 2.0)}  # norm 5
    p = projections.l2_ball(x, jnp.array([1.0, 10.0]))
    np.testing.assert_allclose(p["a"][0], 3 / 5)
    np.testing.assert_allclose(p["b"][0], 2 / 5)
    np.testing.assert_allclose(p["b"][1], 2.0)


def test_the_l2_ball_has_a_derivative_at_its_centre_and_may_be_a_point():
    """Regression: a ball of radius zero gave NaN."""
    x = jnp.array([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    radius = jnp.array([0.0, 1.0, 1.0])
    np.testing.assert_allclose(projections.l2_ball(x, radius), [[0, 0], [0, 0], [0.6, 0.8]])
    J = jax.jacrev(projections.l2_ball)(x, radius)
    np.testing.assert_allclose(J[1, :, 1], np.eye(2))
    unit = np.array([0.6, 0.8])
    np.testing.assert_allclose(J[2, :, 2], (np.eye(2) - np.outer(unit, unit)) / 5)
    assert np.all(np.isfinite(J))


def test_a_bad_radius_does_not_pass_for_no_constraint():
    p = projections.l2_ball(jnp.ones((2, 3)), jnp.array([jnp.nan, 1.0]))
    assert np.all(np.isnan(p[0]))
    assert np.all(np.isfinite(p[1]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SETS)
def test_keeps_the_dtype(name, dtype):
    """Regression: wider radii widened the input."""
    assert SETS[name][0](jnp.ones((B, N), dtype)).dtype == dtype
