"""The reversible gradient against unrolling, its limit, and what it does when rounding wins."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import Implicit, Reversible, Unrolled
from jdeq.solution import Result
from jdeq.solvers import Anderson
from jdeq.solvers import Reversible as ReversibleSolver
from tests.jdeq import problems

EXACT = {"rtol": 0.0, "atol": 0.0}


def loss(p, adjoint, options, params, x, probe=None):
    s = jdeq.deq(p.cell, params, x, p.z0, adjoint=adjoint, backward_probe=probe, **options)
    weights = jnp.cos(jnp.arange(s.value.size)).reshape(s.value.shape)
    return jnp.sum(weights * s.value)


def gradient(p, adjoint, damping=0.5, **options):
    options = {"solver": ReversibleSolver(damping), **options}
    if not isinstance(adjoint, Reversible):
        return jax.jit(jax.grad(functools.partial(loss, p, adjoint, options), (0, 1)))(
            p.params, p.x
        )
    probe = jnp.zeros((p.z0.shape[0], 3))
    *bars, rows = jax.jit(jax.grad(functools.partial(loss, p, adjoint, options), (0, 1, 2)))(
        p.params, p.x, probe
    )
    return tuple(bars), np.asarray(rows)


def error(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(problems.relative_error(a, b) for a, b in pairs)


@pytest.mark.parametrize(("damping", "steps"), [(0.3, 70), (0.5, 25), (0.8, 12)])
def test_is_the_gradient_of_the_unrolled_iteration(damping, steps):
    """Of an unconverged one, which the implicit gradient is not."""
    p = problems.tanh()
    options = {"damping": damping, "max_steps": steps, **EXACT}
    got, rows = gradient(p, Reversible(), **options)
    want = gradient(p, Unrolled(), **options)
    assert error(got, want) < 1e-10
    assert np.all(rows[:, 2] == Result.converged)
    assert error(gradient(p, Implicit(max_steps=500, rtol=1e-12), **options), want) > 1e-5


def test_each_problem_walks_as_far_as_it_went():
    p = problems.conditioned((0.0, 0.3, 0.5))
    options = {"max_steps": 200, "rtol": 1e-3, "atol": 0.0}
    (_, got), rows = gradient(p, Reversible(rtol=0.0), 0.2, **options)
    s = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=ReversibleSolver(0.2), **options)
    assert len(set(np.asarray(s.steps))) == 3
    np.testing.assert_array_equal(rows[:, 1], s.steps - 1)
    assert error(got, gradient(p, Unrolled(), 0.2, **options)[1]) < 1e-10


def test_a_solution_that_is_not_the_last_iterate():
    """The iterate of least residual is returned, and it is its gradient that is taken."""
    p = problems.conditioned((-1.8, -0.2, 0.3))
    # The first problem comes nearer at first, and then runs away.
    p = p._replace(z0=jnp.asarray(p.answer) + 0.1)
    options = {"max_steps": 8, **EXACT}
    s = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=ReversibleSolver(0.2), history=True, **options)
    assert 0 < np.argmin(s.history.residual[:, 0]) < 7
    (_, got), _ = gradient(p, Reversible(), 0.2, **options)
    assert error(got, gradient(p, Unrolled(), 0.2, **options)[1]) < 1e-10


@pytest.mark.parametrize("damping", [0.5, 0.8])
def test_tends_to_the_implicit_gradient_and_stops_at_the_tolerance(damping):
    p = problems.tanh()
    exact = gradient(p, Implicit(rtol=1e-13), damping, rtol=1e-13, atol=0.0, max_steps=900)
    errors = []
    for rtol in (1e-4, 1e-8):
        got, rows = gradient(p, Reversible(), damping, rtol=rtol, atol=0.0, max_steps=400)
        errors.append(error(got, exact))
        assert np.all(rows[:, 0] <= 10 * rtol * np.sqrt(problems.N))
        assert np.all(rows[:, 1] < 150)
    assert errors[0] < 1e-2
    assert errors[1] < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_long_walk_gives_its_reconstruction_up_and_stays_right(dtype):
    """Regression: undoing 200 steps at damping 0.8 multiplies rounding by 5^200."""
    p = problems.tanh()
    arrays = jax.tree.map(lambda v: jnp.asarray(v, dtype), (p.params, p.x, p.z0))
    p = p._replace(params=arrays[0], x=arrays[1], z0=arrays[2])
    options = {"damping": 0.8, "max_steps": 200, **EXACT}
    got, rows = gradient(p, Reversible(), **options)
    assert np.all(rows[:, 2] == Result.stagnated)
    assert np.all(np.isfinite(rows))
    limit = 1e-12 if dtype == jnp.float64 else 1e-5
    assert error(got, gradient(p, Unrolled(), **options)) < limit


def test_a_slow_problem_is_given_up_with_its_cotangent_still_large():
    """The rest of the walk, with the derivative at the solution, leads to the right end."""
    p = problems.conditioned((0.95, 0.5, 0.9))
    options = {"max_steps": 3000, "rtol": 1e-10, "atol": 0.0}
    (_, got), rows = gradient(p, Reversible(), **options)
    assert rows[0, 2] == Result.stagnated
    weights = jnp.cos(jnp.arange(15.0)).reshape(3, 5)
    np.testing.assert_allclose(got["shift"], weights / (1 - p.x["rate"]), rtol=1e-6)


def test_a_reconstruction_outside_the_domain_is_not_used():
    """``sqrt`` of a negative number is what drift leads to here."""
    p = problems.root()
    options = {"solver": ReversibleSolver(0.9), "rtol": 1e-13, "atol": 0.0, "max_steps": 300}

    def z(x):
        s = jdeq.deq(p.cell, p.params, x, p.z0, adjoint=Reversible(rtol=0.0), **options)
        return jnp.sum(s.value)

    got = jax.jit(jax.grad(z))(p.x)
    np.testing.assert_allclose(got, (1 + 4 * p.x) ** -0.5, rtol=1e-9)


def test_a_failed_problem_contributes_zero():
    p = problems.conditioned((0.1, 0.5, 0.9))
    options = {"solver": ReversibleSolver(), "max_steps": 80}
    for value in (jnp.nan, 1e200):
        bad = {**p.x, "rate": p.x["rate"].at[1].set(value)}
        of = jax.jit(jax.grad(functools.partial(loss, p, Reversible(), options), (0, 1)))
        _, want = of(p.params, p.x)
        params_bar, got = of(p.params, bad)
        assert jnp.isfinite(params_bar)
        for name in got:
            np.testing.assert_array_equal(got[name][1], 0)
            np.testing.assert_allclose(got[name][::2], want[name][::2], rtol=1e-12)


def test_under_vmap_and_with_a_memory_that_was_given():
    p = problems.tanh()
    options = {"solver": ReversibleSolver(), "max_steps": 20, **EXACT}
    of = jax.grad(functools.partial(loss, p, Reversible(), options), 1)
    several = jnp.stack([p.x, 0.5 * p.x])
    mapped = jax.jit(jax.vmap(of, (None, 0)))(p.params, several)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], of(p.params, several[i]), rtol=1e-10)
    solver = ReversibleSolver()
    first = jdeq.deq(
        p.cell, p.params, p.x, p.z0, adjoint=Reversible(), memory=solver.init(p.z0), **options
    )
    plain = jdeq.deq(p.cell, p.params, p.x, p.z0, memory=solver.init(p.z0), **options)
    np.testing.assert_array_equal(first.aux.memory, plain.aux.memory)
    assert jdeq.deq(p.cell, p.params, p.x, p.z0, adjoint=Reversible(), **options).aux is None


def test_integers_in_params_need_no_gradient():
    p = problems.tanh()

    def cell(params, z, x):
        return problems.tanh_cell(params, z, x) + 0.01 * params["count"]

    def of(W):
        params = {**p.params, "W": W, "count": 3, "key": jax.random.key(0)}
        s = jdeq.deq(
            cell, params, p.x, p.z0, adjoint=Reversible(), solver=ReversibleSolver(), max_steps=9
        )
        return jnp.sum(jnp.sin(s.value))

    W = p.params["W"]
    direction = jnp.cos(W)
    want = problems.central_difference(lambda t: of(W + t * direction))
    assert abs(jnp.vdot(jax.grad(of)(W), direction) - want) <= 1e-8 * abs(want)


def test_memory_does_not_grow_with_the_steps():
    p = problems.tanh(batch=64)

    def of(steps):
        options = {"solver": ReversibleSolver(), "max_steps": steps}
        compiled = jax.jit(jax.grad(functools.partial(loss, p, Reversible(), options)))
        analysis = compiled.lower(p.params, p.x).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    short, long = of(20), of(200)
    assert short > 0
    assert long <= short


def test_where_it_cannot_work_it_says_so():
    p = problems.root()
    with pytest.raises(ValueError, match="whose steps cannot be undone"):
        jdeq.deq(p.cell, p.params, p.x, p.z0, solver=Anderson(), adjoint=Reversible())

    def z(t):
        s = jdeq.deq(
            p.cell, p.params, t * p.x, p.z0, solver=ReversibleSolver(), adjoint=Reversible()
        )
        return jnp.sum(s.value)

    with pytest.raises(NotImplementedError, match="first derivatives in reverse mode only"):
        jax.grad(jax.grad(z))(1.0)
    with pytest.raises(ValueError, match="Reversible: rtol="):
        Reversible(rtol=-1.0)
