"""Each projection is feasible, idempotent, and nearest: ``(x - P x) . (y - P x) <= 0``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jdeq import projections
from tests.jdeq import problems

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
    "l2_ball_in_box": (
        lambda x: projections.l2_ball_in_box(x, jnp.array(RADIUS), -0.5, 1.0),
        lambda x: np.maximum(
            np.linalg.norm(x, axis=1) - RADIUS, np.max(np.maximum(x - 1.0, -0.5 - x), axis=1)
        ),
    ),
    "linf_ball_in_box": (
        lambda x: projections.linf_ball_in_box(x, jnp.array(RADIUS), -0.5, 1.0),
        lambda x: np.maximum(
            np.max(np.abs(x), axis=1) - RADIUS, np.max(np.maximum(x - 1.0, -0.5 - x), axis=1)
        ),
    ),
    "simplex": (
        lambda x: projections.simplex(x, 2.0),
        lambda x: np.maximum(np.max(-x, axis=1), np.abs(np.sum(x, axis=1) - 2.0)),
    ),
}


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e25])
def test_l2_ball_of_numbers_whose_squares_leave_the_range(size):
    """Regression: in float32 it was zero above 2e19, and x itself below 1e-23."""
    x = jnp.array([[3.0, 4.0], [0.3, -0.4]], jnp.float32) * jnp.float32(size)

    def project(x):
        return projections.l2_ball(x, jnp.full(2, size, jnp.float32))

    np.testing.assert_allclose(project(x), x * jnp.array([[0.2], [1.0]]), rtol=1e-6)
    # Along x the projection of what is outside stands still; across it moves by a fifth.
    _, along = jax.jvp(project, (x,), (x,))
    np.testing.assert_allclose(along[0] / size, 0, atol=1e-6)
    across = jnp.array([[-4.0, 3.0], [0.0, 0.0]], jnp.float32) * jnp.float32(size)
    _, moved = jax.jvp(project, (x,), (across,))
    np.testing.assert_allclose(moved[0], 0.2 * across[0], rtol=1e-5)


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


@pytest.mark.parametrize("offset", [1.0, 1e3, -1e5])
def test_the_simplex_is_reached_in_float32_from_far_away(offset):
    """Regression: entries that lie close together far from zero gave sums of 1.0003, or 4."""
    rng = np.random.default_rng(0)
    x = jnp.array(offset + 0.01 * rng.normal(size=(B, 300)), jnp.float32)
    p = np.asarray(projections.simplex(x), np.float64)
    assert np.all(p >= 0)
    np.testing.assert_allclose(np.sum(p, axis=1), 1.0, atol=1e-6)
    centred = np.asarray(x, np.float64) - np.mean(x, axis=1, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(p, projections.simplex(jnp.array(centred)), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SETS)
def test_keeps_the_dtype(name, dtype):
    """Regression: wider radii widened the input."""
    assert SETS[name][0](jnp.ones((B, N), dtype)).dtype == dtype


def perturbations(seed, count, size, spread=1.0):
    """Perturbations of images that touch 0 and 1, of scales far apart, and their bounds."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, size)) * 10 ** rng.uniform(-spread, spread, size=(count, size))
    image = np.clip(rng.uniform(-0.3, 1.3, size=(count, size)), 0, 1)
    radius = np.sqrt(size) * 10 ** rng.uniform(-1.5, 0.2, size=count)
    return x, radius, -image, 1 - image


def bisect(x, radius, lower, upper):
    """The same point by 200 halvings of the dual, one problem at a time."""
    point = np.clip(x, lower, upper)
    if point @ point <= radius**2:
        return point
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        point = np.clip(middle * x, lower, upper)
        low, high = (low, middle) if point @ point > radius**2 else (middle, high)
    return point


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_the_l2_ball_in_a_box_is_what_bisection_finds(spread):
    given = perturbations(0, 64, 50, spread)
    want = np.array([bisect(*row) for row in zip(*given, strict=True)])
    bound = np.linalg.norm(want, axis=1) > (1 - 1e-9) * given[1]
    assert 10 < np.sum(bound) < 64  # both sides of the ball's constraint
    p = jax.jit(projections.l2_ball_in_box)(*map(jnp.array, given))
    np.testing.assert_allclose(p, want, atol=1e-14)
    assert np.all(np.linalg.norm(p, axis=1) <= given[1] * (1 + 1e-15 * 50))
    assert np.all((p >= given[2]) & (p <= given[3]))
    narrow = projections.l2_ball_in_box(*(jnp.array(v, jnp.float32) for v in given))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, want, atol=2e-6)
    assert np.all(np.linalg.norm(np.asarray(narrow, float), axis=1) <= given[1] * (1 + 1e-6))


def test_the_l2_ball_in_a_box_is_what_a_general_optimiser_finds():
    for row in zip(*perturbations(1, 4, 6), strict=True):
        x, radius, lower, upper = row
        found = minimize(
            lambda p, x=x: 0.5 * np.sum((p - x) ** 2),
            np.zeros(6),
            jac=lambda p, x=x: p - x,
            bounds=np.stack([lower, upper], axis=1),
            constraints={"type": "ineq", "fun": lambda p, r=radius: r**2 - p @ p},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        p = projections.l2_ball_in_box(*(jnp.array(v)[None] for v in row))[0]
        np.testing.assert_allclose(p, found.x, atol=1e-6)


def test_derivatives_of_the_l2_ball_in_a_box():
    """First against finite differences, second by differentiating both ways; all bounds too."""
    given = tuple(map(jnp.array, perturbations(2, 8, 6)))
    rng = np.random.default_rng(0)
    weight = jnp.array(rng.normal(size=(8, 6)))
    direction = tuple(jnp.array(rng.normal(size=v.shape)) for v in given)

    def loss(x, radius, lower, upper):
        return jnp.sum(weight * jnp.sin(projections.l2_ball_in_box(x, radius, lower, upper)))

    @jax.jit
    def along(t):
        return loss(*(v + t * d for v, d in zip(given, direction, strict=True)))

    touching = (given[2] == 0) | (given[3] == 0)
    given = (given[0], given[1], given[2] - 0.1 * touching, given[3] + 0.1 * touching)
    want = problems.central_difference(along, 1e-5)
    bars = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*given)
    assert all(np.any(bar != 0) for bar in bars)
    got = sum(jnp.vdot(bar, d) for bar, d in zip(bars, direction, strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-7)
    np.testing.assert_allclose(jax.jvp(along, (0.0,), (1.0,))[1], want, rtol=1e-7)

    slope = jax.jit(jax.grad(along))
    np.testing.assert_allclose(
        jax.grad(slope)(0.0), problems.central_difference(slope, 1e-5), rtol=1e-6
    )


def test_the_l2_ball_in_a_box_under_vmap_and_with_several_leaves():
    x, radius, lower, upper = map(jnp.array, perturbations(3, 6, 8))
    want = projections.l2_ball_in_box(x, radius, lower, upper)
    stacked = (v.reshape(2, 3, *v.shape[1:]) for v in (x, radius, lower, upper))
    twice = jax.vmap(projections.l2_ball_in_box)(*stacked)
    np.testing.assert_allclose(twice.reshape(6, 8), want, rtol=1e-14)

    def split(v):
        return {"a": v[:, :2], "b": v[:, 2:].reshape(6, 3, 2)}

    apart = projections.l2_ball_in_box(split(x), radius, split(lower), split(upper))
    np.testing.assert_allclose(apart["b"], split(want)["b"], rtol=1e-14)
    scalar = projections.l2_ball_in_box(split(x), radius, -0.1, 0.2)
    whole = projections.l2_ball_in_box(x, radius, -0.1, 0.2)
    np.testing.assert_allclose(scalar["a"], split(whole)["a"], rtol=1e-14)
    cube = projections.linf_ball_in_box(split(x), radius, split(lower), split(upper))
    side = radius[:, None]
    want = jnp.clip(x, jnp.maximum(lower, -side), jnp.minimum(upper, side))
    np.testing.assert_allclose(cube["b"], split(want)["b"])


def test_a_box_of_several_leaves_has_bounds_like_x_or_scalar_ones():
    """Regression: scalar bounds of a tree were refused."""
    x = {"a": jnp.array([[-3.0, 0.1]]), "b": [jnp.array([[5.0]], jnp.float32)]}
    lower = {"a": jnp.array([[-2.0, 0.2]]), "b": [jnp.array([[-1.0]])]}
    p = projections.box(x, lower, 0.5)
    np.testing.assert_allclose(p["a"], [[-2.0, 0.2]])
    np.testing.assert_allclose(p["b"][0], [[0.5]])
    assert p["b"][0].dtype == jnp.float32
    np.testing.assert_allclose(projections.box(x, -1.0, 0.5)["a"], [[-1.0, 0.1]])


def test_edges_of_the_l2_ball_in_a_box():
    """A point for a ball, a box without room, x at zero: finite with finite derivatives."""
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [-3.0, 4.0]])
    radius = jnp.array([0.0, 1.0, 1.0, 1.0, jnp.inf])
    lower = jnp.array([[-1.0, -1.0]] * 5)
    upper = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    p = projections.l2_ball_in_box(x, radius, lower, upper)
    np.testing.assert_allclose(p, [[0, 0], [0, 0], [0, 0], [0, 1], [-1, 2]])
    derivative = jax.jit(jax.jacrev(projections.l2_ball_in_box, (0, 1, 2, 3)))
    bars = derivative(x, radius, lower, upper)
    assert all(np.all(np.isfinite(bar)) for bar in bars)


def test_bad_bounds_and_radii_of_the_l2_ball_in_a_box_do_not_pass():
    x, lower = jnp.ones((3, 2)), jnp.array([[-1.0, -1.0], [-1.0, 0.5], [-1.0, -1.0]])
    p = projections.l2_ball_in_box(x, jnp.array([jnp.nan, 1.0, 1.0]), lower, 2.0)
    assert np.all(np.isnan(p[:2]))
    np.testing.assert_allclose(p[2], np.sqrt(0.5))
