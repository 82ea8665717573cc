from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import Unrolled
from jdeq.solution import Result
from jdeq.solvers import NewtonKrylov
from tests.jdeq import problems


def test_one_newton_step_solves_a_linear_system():
    """Also one that is no contraction."""
    p = problems.linear(norm=3.0)
    solver = NewtonKrylov(dimension=problems.N, forcing=1e-12)
    s = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=solver, rtol=1e-8, max_steps=3, history=True)
    assert np.all(s.result == Result.converged)
    assert np.all(np.isfinite(np.asarray(s.history.residual)[:2]))
    assert np.all(np.isnan(np.asarray(s.history.residual)[2]))
    # Two evaluations of the cell, and as many products as there are dimensions.
    assert np.all(s.steps == 2 + problems.N)
    np.testing.assert_allclose(s.value, p.answer, rtol=1e-7, atol=1e-9)


def test_converges_quadratically():
    p = problems.tanh(norm=0.9)
    solver = NewtonKrylov(dimension=problems.N, forcing=1e-12)
    s = jdeq.deq(
        p.cell, p.params, p.x, p.z0, solver=solver, rtol=1e-13, atol=0.0, max_steps=20, history=True
    )
    assert np.all(s.result == Result.converged)
    for rows in np.asarray(s.history.residual).T:
        small = rows[np.isfinite(rows) & (rows > 1e-12)]
        assert np.all(small[1:][small[:-1] < 0.1] < 5 * small[:-1][small[:-1] < 0.1] ** 2)


def test_a_step_that_overshoots_is_halved():
    """The root of ``arctan(z)``, from where the full Newton step runs away."""
    z0 = jnp.array([[2.0], [-10.0], [0.5]])

    def f(_, z):
        return z - jnp.arctan(z)

    options = {"rtol": 0.0, "atol": 1e-10, "max_steps": 60}
    s = jdeq.fixed_point(f, None, z0, solver=NewtonKrylov(forcing=1e-10), **options)
    assert np.all(s.result == Result.converged)
    np.testing.assert_allclose(s.value, 0, atol=1e-9)
    full = jdeq.fixed_point(f, None, z0, solver=NewtonKrylov(halvings=0), **options)
    assert not np.any(full.result[:2] == Result.converged)


def test_a_solve_that_goes_on_sets_out_from_its_own_start():
    """The last solve's residual would have its first step halved, back to that solve's point."""
    p = problems.tanh(norm=0.9)
    solver = NewtonKrylov()
    options = {"solver": solver, "rtol": 1e-12, "atol": 0.0}
    last = jdeq.deq(p.cell, p.params, p.x, p.z0, memory=solver.init(p.z0), **options)
    warm = jdeq.deq(
        p.cell, p.params, 2 * p.x, p.z0 + 1, memory=last.aux.memory, history=lambda z: z, **options
    )
    plain = jdeq.deq(p.cell, p.params, 2 * p.x, p.z0 + 1, history=lambda z: z, **options)
    np.testing.assert_array_equal(warm.steps, plain.steps)
    np.testing.assert_array_equal(warm.history.record, plain.history.record)


def test_is_a_backward_solver_too():
    p = problems.tanh(norm=0.9)
    options = {"rtol": 1e-12, "atol": 0.0}

    def gradient(solver):
        def loss(x):
            s = jdeq.deq(p.cell, p.params, x, p.z0, solver=solver, max_steps=500, **options)
            return jnp.sum(jnp.sin(s.value))

        return jax.jit(jax.grad(loss))(p.x)

    np.testing.assert_allclose(gradient(NewtonKrylov()), gradient(None), rtol=1e-8, atol=1e-10)


def test_where_it_cannot_work_it_says_so():
    p = problems.linear()
    with pytest.raises(ValueError, match="needs Jacobian-vector products"):
        jax.grad(
            lambda x: jnp.sum(
                jdeq.deq(p.cell, p.params, x, p.z0, solver=NewtonKrylov(), adjoint=Unrolled()).value
            )
        )(p.x)


@pytest.mark.parametrize("options", [{"dimension": 0}, {"forcing": 0.0}, {"halvings": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="NewtonKrylov: "):
        NewtonKrylov(**options)
