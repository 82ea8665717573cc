"""Problems with answers in closed form.

Cells are module-level functions, so that tests which call them alike share one compilation. Arrays
are made on demand: precision is set after this module is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jdeq

B, N, M = 3, 5, 4
"""Problems in a batch, entries of a state, entries of an input."""

PyTree = Any


class Equilibrium(NamedTuple):
    """A cell, its arguments, and its fixed point."""

    cell: Callable
    params: PyTree
    x: PyTree
    z0: PyTree
    answer: PyTree


def matrix(rng: np.random.Generator, rows: int, columns: int, norm: float) -> np.ndarray:
    """A Gaussian matrix scaled to a spectral norm."""
    a = rng.normal(size=(rows, columns))
    return norm * a / np.linalg.norm(a, 2)


def linear_cell(params, z, x):
    return z @ params["W"].T + x @ params["U"].T


def tanh_cell(params, z, x):
    return jnp.tanh(z @ params["W"].T + x @ params["U"].T + params["b"])


def rate_cell(params, z, x):
    """Elementwise, so that a problem's numbers do not depend on its neighbours, to the last bit."""
    return x["rate"] * z + x["shift"] + 0 * params


def root_cell(params, z, x):
    return jnp.sqrt(z + x) + 0 * params


def tree_cell(params, z, x):
    total = jnp.sum(z["a"], axis=1) + jnp.sum(x.astype(z["a"].dtype), axis=1)
    b = 0.3 * z["b"][0] + 0.1 * total[:, None, None].astype(z["b"][0].dtype)
    return {"a": params * z["a"] + x.astype(z["a"].dtype), "b": (b,)}


def linear(seed: int = 0, norm: float = 0.8, batch: int = B) -> Equilibrium:
    """``z = W z + U x`` with a contraction ``W``."""
    rng = np.random.default_rng(seed)
    W, U = matrix(rng, N, N, norm), matrix(rng, N, M, 1.0)
    x = rng.normal(size=(batch, M))
    answer = np.linalg.solve(np.eye(N) - W, (x @ U.T).T).T
    params = {"W": jnp.array(W), "U": jnp.array(U)}
    return Equilibrium(linear_cell, params, jnp.array(x), jnp.zeros((batch, N)), answer)


def conditioned(rates: tuple[float, ...] = (0.1, 0.5, 0.9)) -> Equilibrium:
    """``z = rate z + shift`` with a rate for each problem."""
    rng = np.random.default_rng(1)
    rate = np.array(rates)[:, None]
    shift = rng.normal(size=(len(rates), N))
    x = {"rate": jnp.array(rate), "shift": jnp.array(shift)}
    z0 = jnp.zeros((len(rates), N))
    return Equilibrium(rate_cell, jnp.ones(()), x, z0, shift / (1 - rate))


def root() -> Equilibrium:
    """``z = sqrt(z + x)``, whose answer is ``(1 + sqrt(1 + 4 x)) / 2``."""
    x = np.array([[0.5], [2.0], [30.0]])
    answer = (1 + np.sqrt(1 + 4 * x)) / 2
    return Equilibrium(root_cell, jnp.ones(()), jnp.array(x), jnp.ones((3, 1)), answer)


def tanh(seed: int = 0, norm: float = 0.9, batch: int = B) -> Equilibrium:
    """A dense cell whose input is made to fit the answer."""
    rng = np.random.default_rng(seed)
    W, b = matrix(rng, N, N, norm), 0.1 * rng.normal(size=N)
    U = np.linalg.qr(rng.normal(size=(N, N)))[0]
    answer = np.tanh(rng.normal(size=(batch, N)))
    x = np.linalg.solve(U, (np.arctanh(answer) - answer @ W.T - b).T).T
    params = {"W": jnp.array(W), "U": jnp.array(U), "b": jnp.array(b)}
    return Equilibrium(tanh_cell, params, jnp.array(x), jnp.zeros((batch, N)), answer)


def tree() -> Equilibrium:
    """A state of two leaves of different shapes and dtypes, one driving the other."""
    x = np.random.default_rng(2).normal(size=(B, 2)).astype(np.float32)
    a = x.astype(np.float64) / 0.5
    b = np.broadcast_to(0.1 * (a.sum(1) + x.sum(1))[:, None, None] / 0.7, (B, 2, 3))
    z0 = {"a": jnp.zeros((B, 2)), "b": (jnp.zeros((B, 2, 3), jnp.float32),)}
    return Equilibrium(tree_cell, jnp.array(0.5), jnp.array(x), z0, {"a": a, "b": (b,)})


EQUILIBRIA = {
    "linear": linear,
    "conditioned": conditioned,
    "root": root,
    "tanh": tanh,
    "tree": tree,
}


def quadratic(params, z, x, target):
    """Half a squared distance and a penalty on x, one number a problem."""
    distance = jnp.sum((z - target) ** 2, axis=1)
    return params["scale"] * 0.5 * (distance + params["weight"] * jnp.sum(x**2, axis=1))


def quadratic_of_data(params, z, x, target, data):
    return quadratic(params, z, x, target) + 0 * data["radius"]


def linear_cell_of_data(params, z, x, data):
    return linear_cell(params, z, x) + 0 * data["radius"][:, None]


def into_ball(x, data):
    return jdeq.projections.l2_ball(x, data["radius"])


def into_box(x):
    return jdeq.projections.box(x, -0.2, 0.3)


FREE = jdeq.InputProblem(linear_cell, quadratic)
BOXED = jdeq.InputProblem(linear_cell, quadratic, into_box)
BALL = jdeq.InputProblem(linear_cell_of_data, quadratic_of_data, into_ball)


class Optimum(NamedTuple):
    """An input problem, its arguments, and its KKT point; ``data`` holds ``radius`` or is None."""

    problem: jdeq.InputProblem
    params: PyTree
    target: PyTree
    x0: PyTree
    z0: PyTree
    data: PyTree
    x: np.ndarray
    z: np.ndarray
    mu: np.ndarray
    objective: np.ndarray

    @property
    def arguments(self) -> tuple:
        return self.problem, self.params, self.target, self.x0, self.z0


WEIGHT = 0.5
"""Penalty on x of all input problems."""


def optimum(constraint: str = "free", scale: float = 1.0, seed: int = 0) -> Optimum:
    """A linear cell under a quadratic objective, whose optimum is a linear system.

    With ``z = R x``, ``R = (I - W)^-1 U``, the problem is a ridge regression in x; in a ball its
    ridge grows until the norm fits, and in a box it is a bounded least-squares problem.
    """
    rng = np.random.default_rng(seed)
    W, U = matrix(rng, N, N, 0.5), matrix(rng, N, M, 1.0)
    target = rng.normal(size=(B, N))
    R = np.linalg.solve(np.eye(N) - W, U)
    data = None
    if constraint == "free":
        problem, x = FREE, _ridge(R, target, np.full(B, WEIGHT))
    elif constraint == "box":
        problem, x = BOXED, _bounded(R, target)
    else:
        radius = np.array([0.3, 0.6, 100.0])  # the last one is inactive
        problem, x = BALL, _in_ball(R, target, radius)
        data = {"radius": jnp.array(radius)}
    z = x @ R.T
    mu = scale * np.linalg.solve((np.eye(N) - W).T, (z - target).T).T
    value = scale * 0.5 * (((z - target) ** 2).sum(1) + WEIGHT * (x**2).sum(1))
    params = {"W": jnp.array(W), "U": jnp.array(U), "scale": jnp.array(scale)}
    params["weight"] = jnp.array(WEIGHT)
    x0, z0 = jnp.zeros((B, M)), jnp.zeros((B, N))
    return Optimum(problem, params, jnp.array(target), x0, z0, data, x, z, mu, value)


def _ridge(R: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    rows = [
        np.linalg.solve(R.T @ R + w * np.eye(M), R.T @ t)
        for w, t in zip(weight, target, strict=True)
    ]
    return np.array(rows)


def _in_ball(R: np.ndarray, target: np.ndarray, radius: np.ndarray) -> np.ndarray:
    low, high = np.full(B, WEIGHT), np.full(B, WEIGHT + 1e6)
    free = _ridge(R, target, low)
    for _ in range(200):
        middle = (low + high) / 2
        outside = np.linalg.norm(_ridge(R, target, middle), axis=1) > radius
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    inside = np.linalg.norm(free, axis=1) <= radius
    return np.where(inside[:, None], free, _ridge(R, target, high))


def _bounded(R: np.ndarray, target: np.ndarray) -> np.ndarray:
    """By trying every set of active bounds: the one whose multipliers have the right signs."""
    H = R.T @ R + WEIGHT * np.eye(M)
    bounds = {-1: -0.2, 1: 0.3}
    rows = []
    for t in target:
        for sides in np.ndindex(*(3,) * M):
            side = np.array(sides) - 1
            x = np.array([bounds.get(s, 0.0) for s in side])
            free = side == 0
            x[free] = np.linalg.solve(H[np.ix_(free, free)], (R.T @ t - H @ x)[free])
            gradient = H @ x - R.T @ t
            feasible = np.all((x >= -0.2 - 1e-12) & (x <= 0.3 + 1e-12))
            if feasible and np.all(side * gradient <= 1e-12):
                rows.append(x)
                break
    return np.array(rows)


def relative_error(got: PyTree, want: PyTree) -> float:
    """Largest error of any entry over the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def central_difference(f: Callable[[float], float], step: float = 1e-3) -> float:
    """Derivative at zero, of fourth order in ``step``."""
    near = (f(step) - f(-step)) / (2 * step)
    far = (f(2 * step) - f(-2 * step)) / (4 * step)
    return float((4 * near - far) / 3)
