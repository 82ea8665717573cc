"""Finished problems that leave the computation: the answers stay, the work goes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Anderson, Broyden, NewtonKrylov, Picard
from tests.jdeq import problems

RATES = tuple(np.linspace(0.05, 0.97, 13))


def uneven(**options):
    p = problems.conditioned(RATES)
    options = {"solver": Picard(), "rtol": 1e-10, "atol": 0.0, "max_steps": 800} | options
    return p, lambda x: jdeq.deq(p.cell, p.params, x, p.z0, **options)


@pytest.mark.parametrize(
    ("solver", "sizes"), [(Picard(), 9), (Anderson(3), 1), (Broyden(5), 3), (NewtonKrylov(3), 2)]
)
def test_elementwise_problems_do_not_notice(solver, sizes):
    p, plain = uneven(solver=solver)
    _, compacted = uneven(solver=solver, compaction=sizes)
    a, b = plain(p.x), compacted(p.x)
    np.testing.assert_allclose(b.value, a.value, rtol=1e-12)
    np.testing.assert_array_equal(b.result, a.result)
    np.testing.assert_array_equal(b.steps, a.steps)
    np.testing.assert_allclose(b.value, p.answer, rtol=1e-8)


def test_the_gradient_is_that_of_the_whole_batch():
    p, plain = uneven()
    _, compacted = uneven(compaction=3)

    def total(solve, x):
        return jnp.sum(solve(x).value ** 3)

    want = jax.grad(lambda x: total(plain, x))(p.x)
    got = jax.jit(jax.grad(lambda x: total(compacted, x)))(p.x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-7), want, got)
    exact = 3 * p.answer**2 / (1 - np.array(RATES)[:, None])
    np.testing.assert_allclose(got["shift"], exact, rtol=1e-7)


def test_second_derivatives():
    p, compacted = uneven(compaction=2)
    v = jax.tree.map(jnp.ones_like, p.x)

    def slope(solve, x):
        gradient = jax.grad(lambda x: jnp.sum(solve(x).value ** 3))(x)
        return sum(jnp.sum(leaf * w) for leaf, w in zip(gradient.values(), v.values(), strict=True))

    want = jax.grad(lambda x: slope(uneven()[1], x))(p.x)
    got = jax.grad(lambda x: slope(compacted, x))(p.x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-6), want, got)


def test_captured_arrays_and_keys_of_any_kind():
    p = problems.conditioned(RATES)

    @jax.jit
    def solve(weight, offset, key):
        noise = jax.random.normal(key, (problems.N,))

        def cell(params, z, x):
            # The number of problems is part of the traced program.
            rows = jnp.zeros(len(z)).at[:].set(1.0)[:, None] * jnp.arange(problems.N)[None, :]
            return params * x["rate"] * z + weight * x["shift"] + noise + offset * rows

        def total(sizes):
            solution = jdeq.deq(cell, 1.0, p.x, p.z0, rtol=1e-10, max_steps=400, compaction=sizes)
            return jnp.sum(solution.value**2), solution.value

        return total(0), total(3)

    gradient = jax.grad(lambda w, i: solve(w, 2, jax.random.key(0))[i][0])
    (_, plain), (_, compacted) = solve(1.5, 2, jax.random.key(0))
    np.testing.assert_allclose(compacted, plain, rtol=1e-9)
    np.testing.assert_allclose(gradient(1.5, 1), gradient(1.5, 0), rtol=1e-8)


def test_failures_stay_where_they_are():
    p, solve = uneven(compaction=3, max_steps=400)
    x = {**p.x, "shift": p.x["shift"].at[2].set(jnp.nan)}
    x["rate"] = x["rate"].at[5].set(3.0)
    solution = solve(x)
    result = [Result.converged] * 13
    result[2], result[5] = Result.non_finite, Result.diverged
    result[-1] = Result.max_steps
    assert solution.result.tolist() == result
    good = np.array(result) == Result.converged
    np.testing.assert_allclose(solution.value[good], p.answer[good], rtol=1e-8)
    gradient = jax.grad(lambda x: jnp.sum(solve(x).value))(x)
    assert np.all(gradient["shift"][jnp.array([2, 5])] == 0)
    exact = np.broadcast_to(1 / (1 - np.array(RATES))[:, None], p.answer.shape)
    np.testing.assert_allclose(gradient["shift"][good], exact[good], rtol=1e-7)


def test_history_is_kept_for_every_problem():
    p, plain = uneven(history=True)
    _, compacted = uneven(history=True, compaction=3)
    np.testing.assert_allclose(
        compacted(p.x).history.residual, plain(p.x).history.residual, rtol=1e-9, atol=1e-13
    )


def test_memory_and_fold_of_every_problem():
    fold = jdeq.Fold(lambda total, z, k: total + jnp.sum(z, axis=1), jnp.zeros(13))
    p, plain = uneven(solver=Anderson(3), fold=fold, memory=Anderson(3).init(jnp.zeros((13, 5))))
    _, compacted = uneven(
        solver=Anderson(3),
        fold=fold,
        memory=Anderson(3).init(jnp.zeros((13, 5))),
        compaction=2,
    )
    a, b = plain(p.x).aux, compacted(p.x).aux
    np.testing.assert_allclose(b.folded, a.folded, rtol=1e-10)
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(v, u, rtol=1e-3, atol=1e-9), a.memory, b.memory
    )


def test_a_single_problem_stays():
    p = problems.conditioned((0.5,))
    solution = jdeq.deq(p.cell, p.params, p.x, p.z0, compaction=4, rtol=1e-10)
    np.testing.assert_allclose(solution.value, p.answer, rtol=1e-8)


@pytest.mark.parametrize(
    ("method", "constraint"), [(jdeq.joint.Polished(), "ball"), (jdeq.joint.Descent(), "free")]
)
def test_joint_solves(method, constraint):
    p = problems.optimum(constraint)
    # Two of three start at their answers and are done at once.
    near = jnp.array([True, False, True])[:, None]
    x0, z0, mu0 = (
        jnp.where(near, at, start)
        for at, start in zip((p.x, p.z, p.mu), (p.x0, p.z0, p.z0), strict=True)
    )

    def solve(target, **more):
        return jdeq.joint_solve(
            p.problem, p.params, target, x0, z0, mu0=mu0, data=p.data, method=method, rtol=1e-4,
            **more,
        )  # fmt: skip

    plain, compacted = solve(p.target), solve(p.target, compaction=3)
    assert plain.steps[1] > 2 * max(plain.steps[0], plain.steps[2])
    np.testing.assert_array_equal(compacted.result, plain.result)
    # The same steps but for the rounding of smaller products, far below the tolerance of 1e-4.
    np.testing.assert_allclose(compacted.value.x, plain.value.x, rtol=1e-6)
    np.testing.assert_allclose(compacted.aux.objective, plain.aux.objective, rtol=1e-6)
    gradients = [
        jax.grad(lambda t, more=more: jnp.sum(solve(t, **more).value.z ** 2))(p.target)
        for more in ({}, {"compaction": 2})
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-6, atol=1e-9)


def test_nested_solves():
    p = problems.optimum()
    solutions = [
        jdeq.nested_solve(*p.arguments, max_steps=200, compaction=sizes) for sizes in (0, 2)
    ]
    np.testing.assert_array_equal(solutions[1].result, solutions[0].result)
    np.testing.assert_allclose(solutions[1].value.x, solutions[0].value.x, rtol=1e-9)


def test_a_history_function_of_the_whole_batch_is_refused():
    p, solve = uneven(compaction=1, history=jnp.mean)
    with pytest.raises(ValueError, match="compaction=1 and a function for history"):
        solve(p.x)


@pytest.mark.parametrize("bad", [-1, 1.5, True])
def test_bad_numbers_of_sizes_are_refused(bad):
    p, solve = uneven(compaction=bad)
    with pytest.raises(ValueError, match="compaction"):
        solve(p.x)
