"""The estimated error of gradients, against the true error at points short of the optimum."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.joint import Accelerated, Polished, hypergradient_error, trust
from jdeq.solution import Result
from jdeq.solvers import Picard
from tests.jdeq import problems

METHODS = {"accelerated": Accelerated(Picard(), 0.1), "polished": Polished()}
BUDGETS = (3, 6, 12, 20, 30, 50, 80, 120)
FACTOR = 5
"""How far estimate and error may be apart."""


def gradients(o, params, state):
    """Partial derivatives of each problem's Lagrangian, ``[B, number of parameters]``."""
    z, x, mu = state
    rest = () if o.data is None else (o.data,)

    def lagrangian(params):
        coupling = jnp.sum(mu * o.problem.cell(params, z, x, *rest), axis=1)
        return o.problem.objective(params, z, x, o.target, *rest) + coupling

    rows = jax.tree.leaves(jax.jacrev(lagrangian)(params))
    return np.concatenate([np.reshape(leaf, (problems.B, -1)) for leaf in rows], axis=1)


def with_exact_adjoint(o, state):
    """What ``StateImplicit`` differentiates: the adjoint equation solved at the given state."""
    slope = o.params["scale"] * (state.z - o.target)
    mu = np.linalg.solve((np.eye(problems.N) - o.params["W"]).T, slope.T).T
    return state._replace(mu=mu)


@functools.cache
def truncated(constraint, method):
    """Solutions cut off after each budget, and the true relative errors of both gradients."""
    o = problems.optimum(constraint)
    solve = jax.jit(
        lambda budget: jdeq.joint_solve(
            *o.arguments, data=o.data, method=METHODS[method], step_budget=budget, rtol=1e-12
        )
    )
    want = gradients(o, o.params, jdeq.AugmentedState(o.z, o.x, o.mu))

    def error(state):
        gap = gradients(o, o.params, state) - want
        return np.linalg.norm(gap, axis=1) / np.linalg.norm(want, axis=1)

    solutions = [solve(budget) for budget in BUDGETS]
    envelope = [error(s.value) for s in solutions]
    state_implicit = [error(with_exact_adjoint(o, s.value)) for s in solutions]
    return solutions, np.array(envelope), np.array(state_implicit)


@pytest.mark.parametrize("constraint", ["free", "ball", "box"])
@pytest.mark.parametrize("method", METHODS)
def test_the_flag_separates_errors_above_and_below_the_level(constraint, method):
    solutions, *errors = truncated(constraint, method)
    for level in (0.3, 1e-2, 1e-4):
        flags = [trust(s, level) for s in solutions]
        for gradient, error in zip(("envelope", "state_implicit"), errors, strict=True):
            trusted = np.array([getattr(flag, gradient) for flag in flags])
            assert np.all(error[trusted] <= FACTOR * level)
            assert np.all(error[~trusted] >= level / FACTOR)
            assert trusted.any()
            assert not trusted.all()


def test_the_adjoints_residual_counts_for_the_envelope_alone():
    o = problems.optimum()
    s = jdeq.joint_solve(*o.arguments, rtol=1e-8)
    off = dataclasses.replace(s, residual=s.residual._replace(adjoint=s.residual.adjoint + 1))
    flags = trust(off, 1e-3)
    assert not np.any(flags.envelope)
    assert np.all(flags.state_implicit)


def test_the_units_of_the_objective_do_not_matter():
    def estimate(scale):
        o = problems.optimum(scale=scale)
        return hypergradient_error(jdeq.joint_solve(*o.arguments, step_budget=20))

    small, large = estimate(1e-3), estimate(1e3)
    for a, b in zip(small, large, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_failed_problem_is_not_trusted_and_zeros_are():
    o = problems.optimum()
    s = jdeq.joint_solve(*o.arguments, rtol=1e-8)
    codes = jnp.array([Result.converged, Result.diverged, Result.non_finite], jnp.int32)
    flags = trust(dataclasses.replace(s, result=codes), 1e-3)
    np.testing.assert_array_equal(flags.envelope, [True, False, False])
    # Nothing to find: z, mu and the gradient are zero, and so are the residuals.
    target = jnp.zeros_like(o.target)
    s = jdeq.joint_solve(o.problem, o.params, target, o.x0, o.z0)
    assert np.all(trust(s, 1e-3).envelope)


def test_it_works_inside_transforms_and_is_a_constant():
    o = problems.optimum()

    def loss(params):
        values, s = jdeq.input_value(o.problem, params, *o.arguments[2:], rtol=1e-6)
        error = hypergradient_error(s).envelope
        return jnp.sum(jnp.where(trust(s, 1e-2).envelope, values, 0)) + jnp.sum(error)

    want = jax.grad(lambda p: jnp.sum(jdeq.input_value(o.problem, p, *o.arguments[2:])[0]))
    got = jax.jit(jax.grad(loss))(o.params)
    for name, leaf in want(o.params).items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-2, atol=1e-3)


def test_bad_level():
    with pytest.raises(ValueError, match="rtol=-1 was given"):
        trust(None, rtol=-1)
