"""The implicit gradient against finite differences, and its behaviour when a solve fails."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq import solvers
from jdeq.adjoints import Implicit, ImplicitForward, Reversible, Shine
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems

# Picard, where the solver does not matter: it compiles fastest.
TIGHT = {"solver": Picard(), "rtol": 1e-13, "atol": 0.0, "max_steps": 1000}


def outer(value):
    return sum(
        jnp.sum(jnp.sin(leaf) * (1 + jnp.arange(leaf.size).reshape(leaf.shape)))
        for leaf in jax.tree.leaves(value)
    )


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), tree)


def inner(a, b):
    return sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def along(tree, direction, t):
    return jax.tree.map(lambda v, d: v + t * d, tree, direction)


def coupled_cell(params, z, x, data):
    """Two leaves of different shapes that drive each other."""
    a = jnp.tanh(z["a"] @ params["W"] + x + 0.3 * jnp.mean(z["b"][0], axis=(1, 2))[:, None])
    b = jnp.sin(0.4 * z["b"][0] + data["gain"] * jnp.sum(z["a"] * params["v"], 1)[:, None, None])
    return {"a": a, "b": [b]}


@functools.partial(jax.jit, static_argnums=1)
def coupled_loss(arguments, solver):
    params, x, data = arguments
    z0 = {"a": jnp.zeros((2, 3)), "b": [jnp.ones((2, 2, 2))]}
    options = {**TIGHT, "solver": solver}
    return outer(jdeq.deq(coupled_cell, params, x, z0, data=data, **options).value)


coupled_gradient = jax.jit(jax.grad(coupled_loss), static_argnums=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("solver", [Picard(0.8), Anderson(), Anderson(kind="I")])
def test_agrees_with_finite_differences(solver, seed):
    rng = np.random.default_rng(seed)
    params = {
        "W": jnp.array(problems.matrix(rng, 3, 3, 0.5)),
        "v": jnp.array(rng.normal(size=3) / 5),
    }
    x = jnp.array(rng.normal(size=(2, 3)))
    data = {"gain": jnp.array(rng.normal(size=(2, 1, 1)) / 5)}
    at = (params, x, data)
    direction = random_like(at, seed)
    want = problems.central_difference(lambda t: coupled_loss(along(at, direction, t), solver))
    got = inner(coupled_gradient(at, solver), direction)
    assert abs(got - want) <= 1e-8 * abs(want)


def test_closed_form_of_a_linear_equilibrium():
    p = problems.linear(norm=0.9)
    v = random_like(p.z0)

    def loss(params, x):
        return inner(jdeq.deq(p.cell, params, x, p.z0, **TIGHT).value, v)

    params_bar, x_bar = jax.grad(loss, (0, 1))(p.params, p.x)
    u = np.linalg.solve((np.eye(problems.N) - p.params["W"]).T, v.T).T
    np.testing.assert_allclose(params_bar["W"], u.T @ p.answer, rtol=1e-10)
    np.testing.assert_allclose(params_bar["U"], u.T @ p.x, rtol=1e-10)
    np.testing.assert_allclose(x_bar, u @ p.params["U"], rtol=1e-10)


def test_second_and_third_derivatives_in_reverse_mode():
    """``z = sqrt(z + x)`` has ``z = (1 + sqrt(1 + 4 x)) / 2``, with derivatives in closed form."""
    p = problems.root()

    def z(x):
        s = jdeq.deq(p.cell, p.params, jnp.reshape(x, (1, 1)), jnp.ones((1, 1)), **TIGHT)
        return s.value[0, 0]

    for x in (0.5, 2.0):
        r = 1 + 4 * x
        first = jax.grad(z)
        np.testing.assert_allclose(first(x), r**-0.5, rtol=1e-10)
        np.testing.assert_allclose(jax.jit(jax.grad(first))(x), -2 * r**-1.5, rtol=1e-9)
    third = jax.jit(jax.grad(jax.grad(first)))(x)
    np.testing.assert_allclose(third, 12 * r**-2.5, rtol=1e-8)


def test_hessian_agrees_with_differences_of_the_gradient():
    p = problems.tanh(norm=0.6)

    def loss(params, x):
        return outer(jdeq.deq(p.cell, params, x, p.z0, **TIGHT).value)

    gradient = jax.jit(jax.grad(loss))
    v, w = random_like(p.params, 1), random_like(p.params, 2)

    @jax.jit
    def hessian_product(params):
        return jax.grad(lambda q: inner(jax.grad(loss)(q, p.x), v))(params)

    want = problems.central_difference(lambda t: inner(gradient(along(p.params, w, t), p.x), v))
    got = inner(hessian_product(p.params), w)
    assert abs(got - want) <= 1e-7 * abs(want)


def test_the_start_and_the_bookkeeping_carry_no_gradient():
    p = problems.tanh()

    def loss(z0):
        s = jdeq.deq(p.cell, p.params, p.x, z0, history=lambda z: z)
        return jnp.sum(s.value) + jnp.sum(s.residual) + jnp.sum(s.history.record)

    assert np.all(jax.grad(loss)(p.z0 + 0.1) == 0)

    def bookkeeping(x):
        s = jdeq.deq(p.cell, p.params, x, p.z0, history=lambda z: z)
        return jnp.sum(s.residual) + jnp.sum(s.history.record) + jnp.nansum(s.history.residual)

    assert np.all(jax.grad(bookkeeping)(p.x) == 0)


@pytest.mark.parametrize(
    ("adjoint", "solver"),
    [
        (Implicit(), Anderson()),
        (ImplicitForward(), Anderson()),
        (Shine(fallback=10), Anderson()),
        (Reversible(), solvers.Reversible()),
    ],
    ids=lambda option: type(option).__name__,
)
def test_a_small_loss_is_differentiated_as_precisely_as_a_large_one(adjoint, solver):
    """Also where squares of its derivative underflow or overflow."""
    p = problems.tanh()
    options = {"adjoint": adjoint, "solver": solver}

    @jax.jit
    def gradient(scale):
        return jax.grad(
            lambda x: scale * outer(jdeq.deq(p.cell, p.params, x, p.z0, **options).value)
        )(p.x)

    reference = gradient(1.0)
    for scale in (1e-200, 1e-12, 1e12, 1e200):
        np.testing.assert_allclose(gradient(scale) / scale, reference, rtol=1e-9)


class TestProbe:
    """``backward_probe`` turns the backward solve's outcome into a cotangent."""

    def read(self, cell, params, x, z0, **options):
        probe = jnp.zeros((z0.shape[0], 3))

        def loss(probe, x):
            s = jdeq.deq(cell, params, x, z0, backward_probe=probe, **options)
            return jnp.sum(s.value)

        return jax.jit(jax.grad(loss, (0, 1)))(probe, x)

    def test_reports_residual_steps_and_code(self):
        p = problems.linear(norm=0.9)
        rows, x_bar = self.read(
            p.cell, p.params, p.x, p.z0, solver=Picard(), rtol=1e-6, atol=0.0, max_steps=500
        )
        residual, steps, code = np.asarray(rows).T
        assert np.all(code == Result.converged)
        # u_k = sum of (W^T)^j v up to k, starting from v itself: replayed here by hand.
        W = np.asarray(p.params["W"])
        u, k = np.ones(problems.N), 1
        while np.linalg.norm(W.T @ u + 1 - u) > 1e-6 * np.linalg.norm(W.T @ u + 1):
            u, k = W.T @ u + 1, k + 1
        assert np.all(steps == k)
        np.testing.assert_allclose(residual, np.linalg.norm(W.T @ u + 1 - u), rtol=1e-6)
        np.testing.assert_allclose(x_bar, np.tile(u @ p.params["U"], (problems.B, 1)), rtol=1e-9)

    def test_says_when_the_limit_came_first(self):
        p = problems.linear(norm=0.9)
        tight = {"solver": Picard(), "rtol": 1e-9}
        cases = [
            {"max_steps": 20, "adjoint": Implicit(max_steps=4)},
            # The forward budget is the backward one's too, unless that has a limit of its own.
            {"max_steps": 20, "step_budget": 4},
            {"max_steps": 4},
        ]
        for case in cases:
            rows, _ = self.read(p.cell, p.params, p.x, p.z0, **tight, **case)
            np.testing.assert_array_equal(rows[:, 1:], [[4, Result.max_steps]] * problems.B)
        free = {"step_budget": 4, "max_steps": 20, "adjoint": Implicit(max_steps=30)}
        rows, _ = self.read(p.cell, p.params, p.x, p.z0, **tight, **free)
        assert np.all(rows[:, 1] == 30)

    def test_backward_tolerance_defaults_to_the_forward_one(self):
        p = problems.linear(norm=0.9)
        loose = {"solver": Picard(), "rtol": 1e-2, "atol": 0.0, "max_steps": 200}
        rows, _ = self.read(p.cell, p.params, p.x, p.z0, **loose)
        tight, _ = self.read(p.cell, p.params, p.x, p.z0, adjoint=Implicit(rtol=1e-8), **loose)
        assert np.all(rows[:, 1] < tight[:, 1])

    def test_a_backward_solve_that_diverges_contributes_zero(self):
        """Anderson finds an expansive map's fixed point; Picard cannot solve its adjoint."""
        p = problems.conditioned((0.5, -3.0, 0.8))
        options = {"solver": Anderson(), "adjoint": Implicit(solver=Picard()), "max_steps": 150}
        rows, x_bar = self.read(p.cell, p.params, p.x, p.z0, **options)
        forward = jdeq.deq(p.cell, p.params, p.x, p.z0, **options)
        assert np.all(forward.result == Result.converged)
        assert rows[:, 2].tolist() == [Result.converged, Result.diverged, Result.converged]
        assert np.all(x_bar["shift"][1] == 0)
        assert np.all(x_bar["rate"][1] == 0)
        np.testing.assert_allclose(x_bar["shift"][::2, 0], [2.0, 5.0], rtol=1e-4)

    def test_under_jit_and_vmap(self):
        p = problems.linear()

        def loss(probe, x):
            s = jdeq.deq(p.cell, p.params, x, p.z0, solver=Picard(), backward_probe=probe)
            return jnp.sum(s.value)

        probe = jnp.zeros((problems.B, 3))
        want = jax.grad(loss)(probe, p.x)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(probe, p.x), want, atol=1e-12)
        mapped = jax.jit(jax.vmap(jax.grad(loss)))(probe[None], p.x[None])
        np.testing.assert_allclose(mapped[0], want, atol=1e-12)


class TestFailures:
    """A failing problem contributes zero and harms nobody."""

    def gradients(self, cell, params, x, z0, weight=None):
        def loss(params, x):
            s = jdeq.deq(cell, params, x, z0, **TIGHT)
            per_problem = jnp.sum(jnp.sin(s.value), 1)
            return jnp.sum(per_problem if weight is None else weight * per_problem), s.result

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    @pytest.mark.parametrize("bad", [[1], [0], [0, 2]])
    def test_nan_inputs(self, bad):
        p = problems.tanh(norm=0.7)
        good = np.setdiff1d(np.arange(problems.B), bad)
        x = p.x.at[np.array(bad), 0].set(jnp.nan)
        (params_bar, x_bar), result = self.gradients(p.cell, p.params, x, p.z0)
        assert np.all(result[np.array(bad)] == Result.non_finite)
        weight = jnp.ones(problems.B).at[np.array(bad)].set(0.0)
        (want, want_x), _ = self.gradients(p.cell, p.params, p.x, p.z0, weight)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), params_bar, want)
        np.testing.assert_array_equal(x_bar[np.array(bad)], 0)
        np.testing.assert_allclose(x_bar[good], want_x[good], rtol=1e-12)

    def test_divergence(self):
        p = problems.conditioned((0.5, 2.0, 0.8))
        weight = jnp.array([1.0, 0.0, 1.0])
        (_, x_bar), result = self.gradients(p.cell, p.params, p.x, p.z0)
        assert result.tolist() == [Result.converged, Result.diverged, Result.converged]
        safe = {**p.x, "rate": p.x["rate"].at[1].set(0.5)}
        (_, want), _ = self.gradients(p.cell, p.params, safe, p.z0, weight)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), x_bar, want)

    def test_a_finite_state_whose_derivative_is_not(self):
        """Regression: such a problem's zero cotangent times infinity spoiled the sum over all."""

        def cell(params, z, x):
            return jnp.tanh(z @ params["W"].T + 0.3) + jnp.sqrt(x * z**2)

        p = problems.tanh(norm=0.6)
        p = p._replace(z0=p.z0 + 1)
        x = jnp.array([[0.01], [0.0], [0.02]])
        (params_bar, x_bar), result = self.gradients(cell, p.params, x, p.z0)
        assert np.all(result == Result.converged)
        weight = jnp.array([1.0, 0.0, 1.0])
        safe = x.at[1].set(0.01)
        (want, want_x), _ = self.gradients(cell, p.params, safe, p.z0, weight)
        np.testing.assert_allclose(params_bar["W"], want["W"], rtol=1e-9)
        np.testing.assert_allclose(x_bar, want_x, rtol=1e-9)
        (params_bar, x_bar), _ = self.gradients(cell, p.params, 0 * x, p.z0)
        np.testing.assert_array_equal(params_bar["W"], 0)
        np.testing.assert_array_equal(x_bar, 0)

    def test_all_problems(self):
        p = problems.tanh()
        (params_bar, x_bar), result = self.gradients(p.cell, p.params, jnp.nan * p.x, p.z0)
        assert np.all(result == Result.non_finite)
        for leaf in jax.tree.leaves((params_bar, x_bar)):
            np.testing.assert_array_equal(leaf, 0)

    def test_second_derivatives(self):
        p = problems.tanh(norm=0.6)

        def curvature(x, weight):
            def loss(t):
                s = jdeq.deq(p.cell, jax.tree.map(lambda v: t * v, p.params), x, p.z0, **TIGHT)
                return jnp.sum(weight * jnp.sum(jnp.sin(s.value), 1))

            return jax.jit(jax.grad(jax.grad(loss)))(1.0)

        got = curvature(p.x.at[1].set(jnp.nan), jnp.ones(problems.B))
        want = curvature(p.x, jnp.ones(problems.B).at[1].set(0.0))
        np.testing.assert_allclose(got, want, rtol=1e-8)

    def test_under_vmap(self):
        p = problems.tanh(norm=0.6)
        several = jnp.stack([p.x, p.x.at[0].set(jnp.nan), jnp.nan * p.x])

        def loss(params, x):
            return outer(jdeq.deq(p.cell, params, x, p.z0, **TIGHT).value)

        gradient = jax.jit(jax.grad(loss))
        mapped = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(p.params, several)
        for i in range(3):
            want = gradient(p.params, several[i])
            row = jax.tree.map(lambda v, i=i: v[i], mapped)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), row, want)
            assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(row))


class TestDiscreteLeaves:
    """Integers, booleans and keys in params and data need no gradient and block nobody's."""

    @staticmethod
    def cell(params, z, x, data):
        noise = jax.vmap(jax.random.uniform)(data["key"])[:, None]
        shift = 0.1 * noise * data["mask"] + 0.01 * params["count"]
        shift += 0.05 * jax.random.uniform(params["key"]) * params["on"]
        return jnp.tanh(z @ params["W"].T + x + shift) + 0 * data["label"][:, None]

    @staticmethod
    def arguments():
        p = problems.tanh(norm=0.6)
        params = {"W": p.params["W"], "count": 3, "on": jnp.array(True), "key": jax.random.key(0)}
        data = {
            "key": jax.random.split(jax.random.key(1), problems.B),
            "mask": jnp.ones((problems.B, problems.N), bool),
            "label": jnp.arange(problems.B),
        }
        return params, p.x, p.z0, data

    def loss(self, W, x, params, data):
        z0 = jnp.zeros((problems.B, problems.N))
        return outer(jdeq.deq(self.cell, {**params, "W": W}, x, z0, data=data, **TIGHT).value)

    def test_gradients(self):
        params, x, _, data = self.arguments()
        gradient = jax.jit(jax.grad(self.loss, (0, 1)))(params["W"], x, params, data)
        direction = random_like((params["W"], x))
        want = problems.central_difference(
            lambda t: self.loss(*along((params["W"], x), direction, t), params, data)
        )
        assert abs(inner(gradient, direction) - want) <= 1e-8 * abs(want)
        eager = jax.grad(self.loss, (0, 1))(params["W"], x, params, data)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), gradient, eager)

    def test_a_failing_problem_among_them(self):
        params, x, _, data = self.arguments()
        x = x.at[2].set(jnp.nan)
        gradient = jax.jit(jax.grad(self.loss, (0, 1)))(params["W"], x, params, data)
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(gradient))
        np.testing.assert_array_equal(gradient[1][2], 0)
        assert np.all(gradient[1][:2] != 0)

    def test_whole_trees_may_be_differentiated(self):
        params, x, z0, data = self.arguments()

        def loss(params, data):
            return outer(jdeq.deq(self.cell, params, x, z0, data=data, **TIGHT).value)

        params_bar, data_bar = jax.grad(loss, (0, 1), allow_int=True)(params, data)
        np.testing.assert_allclose(
            params_bar["W"], jax.grad(self.loss)(params["W"], x, params, data), rtol=1e-9
        )
        assert data_bar["mask"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_keep_their_dtypes(dtype):
    p = problems.tanh(norm=0.5)
    params, x, z0 = jax.tree.map(lambda v: v.astype(dtype), (p.params, p.x, p.z0))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2

    def loss(params, x):
        s = jdeq.deq(p.cell, params, x, z0, rtol=tolerance)
        return jnp.sum(s.value.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert all(v.dtype == dtype for v in jax.tree.leaves(gradient))
    exact = jax.grad(
        lambda params, x: jnp.sum(jdeq.deq(p.cell, params, x, p.z0, **TIGHT).value), (0, 1)
    )(p.params, p.x)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
        assert problems.relative_error(got.astype(jnp.float64), want) < 5 * tolerance
