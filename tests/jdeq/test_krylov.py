"""GMRES and BiCGStab against direct solves and textbooks, and the independence of problems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdeq.krylov import bicgstab, gmres

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


class TestBiCGStab:
    def solve(self, matrices, b, iterations=50, rtol=1e-12):
        def matvec(u):
            return jnp.einsum("bij,bj->bi", matrices, u)

        return jax.jit(lambda b: bicgstab(matvec, b, iterations=iterations, rtol=rtol))(
            jnp.asarray(b)
        )

    def test_solves_linear_systems(self):
        matrices, b = systems()
        matrices = np.eye(N) + 0.5 * (matrices - np.eye(N))
        u, spent = self.solve(matrices, b)
        np.testing.assert_allclose(u, np.linalg.solve(matrices, b[..., None])[..., 0], rtol=1e-9)
        # 2 N products in exact arithmetic, a few more in rounded.
        assert np.all(spent <= 4 * N)

    def test_takes_the_steps_of_the_textbook(self):
        matrices, b = systems(1)
        matrices = np.eye(N) + 0.2 * (matrices - np.eye(N))
        for i in range(2):
            A, u, r, shadow = matrices[i], np.zeros(N), b[i], b[i]
            rho = alpha = omega = 1.0
            v = p = np.zeros(N)
            path = [u]
            for _ in range(3):
                rho_next = shadow @ r
                p = r + rho_next / rho * alpha / omega * (p - omega * v)
                v, rho = A @ p, rho_next
                alpha = rho / (shadow @ v)
                s = r - alpha * v
                t = A @ s
                omega = (t @ s) / (t @ t)
                u, r = u + alpha * p + omega * s, s - omega * t
                path.append(u)
            residuals = [np.linalg.norm(b[i] - A @ u) for u in path]
            got, spent = self.solve(matrices[i : i + 1], b[i : i + 1], iterations=3, rtol=0.0)
            np.testing.assert_allclose(got[0], path[int(np.argmin(residuals))], rtol=1e-8)
            assert spent[0] == 6

    def test_each_problem_stops_on_its_own(self):
        values = np.stack([np.full(N, 2.0), np.array([1, 1, 2, 2, 3, 3, 3]), np.arange(1, N + 1.0)])
        matrices = np.stack([np.diag(v) for v in (*values, np.ones(N))])
        b = np.ones((B, N))
        b[3] = 0
        u, spent = self.solve(matrices, b, rtol=1e-10)
        assert spent[0] == 2
        assert spent[1] <= 6
        assert spent[3] == 0
        np.testing.assert_allclose(u[:3], 1 / values, rtol=1e-8)
        np.testing.assert_array_equal(u[3], 0)
        for i in range(B):
            alone, _ = self.solve(matrices[i : i + 1], b[i : i + 1], rtol=1e-10)
            np.testing.assert_allclose(alone[0], u[i], rtol=1e-13, atol=1e-14)

    def test_a_breakdown_ends_a_problem_alone(self):
        matrices, b = systems()
        matrices[1, :2, :2] = [[0, -1], [1, 0]]
        matrices[1, 2:, :2] = matrices[1, :2, 2:] = 0
        b[1, 2:] = 0
        u, spent = self.solve(matrices, b)
        np.testing.assert_array_equal(u[1], 0)
        assert spent[1] == 2
        others = np.array([0, 2, 3])
        want = np.linalg.solve(matrices[others], b[others][..., None])[..., 0]
        np.testing.assert_allclose(u[others], want, rtol=1e-7)
