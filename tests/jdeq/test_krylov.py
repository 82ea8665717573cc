"""GMRES against direct solves, its optimality, and the independence of problems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdeq.krylov import gmres

B, N = 4, 7


def systems(seed=0):
    rng = np.random.default_rng(seed)
    return np.eye(N) + 0.5 * rng.normal(size=(B, N, N)), rng.normal(size=(B, N))


def solve(matrices, b, dimension, rtol=0.0):
    def matvec(u):
        return jnp.einsum("bij,bj->bi", matrices, u)

    return jax.jit(lambda b: gmres(matvec, b, dimension=dimension, rtol=rtol))(jnp.asarray(b))


def test_solves_in_as_many_steps_as_there_are_dimensions():
    matrices, b = systems()
    u, spent = solve(matrices, b, N)
    np.testing.assert_allclose(u, np.linalg.solve(matrices, b[..., None])[..., 0], rtol=1e-9)
    assert np.all(spent == N)


@pytest.mark.parametrize("dimension", [1, 3, 5])
def test_minimises_the_residual_over_the_krylov_space(dimension):
    matrices, b = systems()
    u, _ = solve(matrices, b, dimension)
    for A, rhs, got in zip(matrices, b, u, strict=True):
        powers = [np.linalg.matrix_power(A, i) @ rhs for i in range(dimension)]
        space, _ = np.linalg.qr(np.stack(powers, axis=1))
        weights = np.linalg.lstsq(A @ space, rhs, rcond=None)[0]
        np.testing.assert_allclose(got, space @ weights, rtol=1e-8, atol=1e-10)


def test_each_problem_stops_on_its_own():
    """One eigenvalue takes one step, three take three; a zero right-hand side takes none."""
    values = np.stack([np.full(N, 2.0), np.array([1, 1, 2, 2, 3, 3, 3]), np.arange(1, N + 1.0)])
    matrices = np.stack([np.diag(v) for v in (*values, np.ones(N))])
    b = np.ones((B, N))
    b[3] = 0
    u, spent = solve(matrices, b, N, rtol=1e-10)
    np.testing.assert_array_equal(spent, [1, 3, N, 0])
    np.testing.assert_allclose(u[:3], 1 / values, rtol=1e-8)
    np.testing.assert_array_equal(u[3], 0)
    for i in range(B):
        alone, _ = solve(matrices[i : i + 1], b[i : i + 1], N, rtol=1e-10)
        np.testing.assert_allclose(alone[0], u[i], rtol=1e-13, atol=1e-14)


def test_stops_at_the_tolerance_asked_for():
    matrices, b = systems()
    matrices = np.eye(N) + 0.2 * (matrices - np.eye(N))
    u, spent = solve(matrices, b, N, rtol=0.1)
    residual = np.linalg.norm(np.einsum("bij,bj->bi", matrices, u) - b, axis=1)
    assert np.all(residual <= 0.1 * np.linalg.norm(b, axis=1) * (1 + 1e-9))
    assert np.all(spent < N)


def test_right_hand_sides_of_several_leaves():
    _, b = systems()
    tree = {"a": jnp.asarray(b[:, :3]), "b": jnp.asarray(b[:, 3:]).reshape(B, 2, 2)}

    def matvec(u):
        total = jnp.sum(u["a"], 1)
        return {"a": 2 * u["a"], "b": 3 * u["b"] + total[:, None, None]}

    u, _ = gmres(matvec, tree, dimension=4, rtol=1e-12)
    image = matvec(u)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), image, tree)
