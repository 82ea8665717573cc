"""Properties over random contractions: any dtype, batch size and structure of the state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard

# Every structure, dtype and batch size is a program of its own, and compiling is what takes time.
SETTINGS = settings(max_examples=6, deadline=None, derandomize=True)

STRUCTURES = (
    ((4,),),
    ((3,), (2, 2)),
    ((2, 1, 3), (), (5,)),
)
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 3e-2}
WIDTH = 4

dtypes = st.sampled_from(sorted(TOLERANCE))
structures = st.sampled_from(STRUCTURES)
solvers = st.sampled_from([Picard(), Anderson(3)])
seeds = st.integers(0, 2**16)


def cell(params, z, x):
    """A contraction by the rate, unless it grows: every leaf listens to a mixture of all."""
    leaves = [leaf.reshape(len(leaf), -1) for leaf in z]
    mixed = sum(leaf @ w for leaf, (w, _) in zip(leaves, params, strict=True))
    images = [
        jnp.tanh(x["rate"] * (mixed @ v) + shift)
        for (_, v), shift in zip(params, x["shift"], strict=True)
    ]
    grown = [x["growth"] * leaf for leaf in leaves]
    return tuple(
        (image + more).reshape(leaf.shape)
        for image, more, leaf in zip(images, grown, z, strict=True)
    )


def draw(seed, structure, dtype, batch, norm=0.9):
    """Parameters, inputs and start; all rates are at most ``norm``."""
    rng = np.random.default_rng(seed)
    sizes = [int(np.prod(shape)) for shape in structure]
    w, v = rng.normal(size=(sum(sizes), WIDTH)), rng.normal(size=(WIDTH, sum(sizes)))
    w, v = w / np.linalg.norm(w, 2), v / np.linalg.norm(v, 2)
    cuts = np.cumsum(sizes)[:-1]
    params = [
        (jnp.array(a, dtype), jnp.array(b, dtype))
        for a, b in zip(np.split(w, cuts), np.split(v, cuts, axis=1), strict=True)
    ]
    x = {
        "rate": jnp.array(rng.uniform(0, norm, size=(batch, 1)), dtype),
        "growth": jnp.zeros((batch, 1), dtype),
        "shift": [jnp.array(rng.normal(size=(batch, n)), dtype) for n in sizes],
    }
    z0 = tuple(jnp.array(rng.normal(size=(batch, *shape)), dtype) for shape in structure)
    return params, x, z0


def solve(params, x, z0, solver=None, **options):
    rtol = TOLERANCE[str(z0[0].dtype)]
    return jdeq.deq(
        cell, params, x, z0, solver=solver, rtol=rtol, atol=0.0, max_steps=300, **options
    )


def rows(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def assert_close(got, want, tolerance):
    """Within what two solutions to ``tolerance`` of a contraction by 0.9 may differ."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=2 * tolerance / (1 - 0.9) * 3)


@given(seed=seeds, structure=structures, dtype=dtypes, batch=st.integers(1, 64), solver=solvers)
@SETTINGS
def test_permuting_a_batch_permutes_its_answers_bit_for_bit(seed, structure, dtype, batch, solver):
    params, x, z0 = draw(seed, structure, dtype, batch)
    order = np.random.default_rng(seed).permutation(batch)
    straight = solve(params, x, z0, solver)
    shuffled = solve(params, rows(x, order), rows(z0, order), solver)
    assert np.all(straight.result == Result.converged)
    for a, b in zip(jax.tree.leaves(shuffled), jax.tree.leaves(straight), strict=True):
        np.testing.assert_array_equal(a, b[order])
    assert [leaf.dtype for leaf in straight.value] == [dtype] * len(structure)


@given(seed=seeds, structure=structures, dtype=dtypes, batch=st.integers(2, 64), solver=solvers)
@settings(SETTINGS, max_examples=3)  # Four programs an example.
def test_splitting_padding_and_compacting_stay_within_the_tolerance(
    seed, structure, dtype, batch, solver
):
    params, x, z0 = draw(seed, structure, dtype, batch)
    whole = solve(params, x, z0, solver)
    part = rows((x, z0), slice(0, batch // 2))
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:3]]), (x, z0))
    assert_close(
        solve(params, *part, solver).value,
        rows(whole.value, slice(0, batch // 2)),
        TOLERANCE[dtype],
    )
    assert_close(
        rows(solve(params, *padded, solver).value, slice(0, batch)), whole.value, TOLERANCE[dtype]
    )
    assert_close(solve(params, x, z0, solver, compaction=3).value, whole.value, TOLERANCE[dtype])


@given(
    seed=seeds,
    structure=structures,
    dtype=st.sampled_from(["float32", "float64"]),
    batch=st.integers(2, 64),
    fault=st.sampled_from(["nan", "diverging"]),
)
@SETTINGS
def test_a_failing_problem_changes_no_others_answer_or_gradient(
    seed, structure, dtype, batch, fault
):
    params, x, z0 = draw(seed, structure, dtype, batch)
    bad = np.random.default_rng(seed).integers(batch)
    good = np.delete(np.arange(batch), bad)
    name, value, result = {
        "nan": ("rate", jnp.nan, Result.non_finite),
        "diverging": ("growth", 3.0, Result.diverged),
    }[fault]
    broken = x | {name: x[name].at[bad].set(value)}

    @jax.jit
    def gradient(x):
        def loss(x):
            solution = solve(params, x, z0, Picard())
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in solution.value), solution

        return jax.grad(loss, has_aux=True)(x)

    (want, clean), (got, solution) = gradient(x), gradient(broken)
    assert solution.result[bad] == result
    for a, b in zip(solution.value, clean.value, strict=True):
        np.testing.assert_array_equal(a[good], b[good])
    np.testing.assert_array_equal(solution.result[good], clean.result[good])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a[good], b[good])
        assert np.all(np.isfinite(a))
