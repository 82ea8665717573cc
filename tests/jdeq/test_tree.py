"""Per-problem arithmetic on trees against the same on flat arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdeq import _tree


def flat(tree):
    leaves = [np.asarray(v, np.float64).reshape(v.shape[0], -1) for v in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1)


def sample(seed):
    rng = np.random.default_rng(seed)
    return {"a": jnp.array(rng.normal(size=(3, 2))), "b": [jnp.array(rng.normal(size=(3, 2, 2)))]}


def test_products_and_norms_run_over_all_leaves_of_a_problem():
    a, b = sample(0), sample(1)
    np.testing.assert_allclose(_tree.dot(a, b), np.sum(flat(a) * flat(b), 1))
    np.testing.assert_allclose(_tree.norm(a), np.linalg.norm(flat(a), axis=1))


def test_a_problem_in_range():
    a = jnp.array([[0.0, 0.0], [3.0, -5.0], [1e-200, 0.0], [-1e200, 1.0], [jnp.nan, 2.0]])
    tree = {"a": a, "b": jnp.full((5, 1), 1e-300), "c": jnp.zeros((5, 0))}
    unit, scaled = _tree.in_range(tree)
    assert unit.tolist() == [2.0**-997, 4.0, 2.0**-664, 2.0**664, 1.0]
    np.testing.assert_array_equal(scaled["a"], a / unit[:, None])
    np.testing.assert_array_equal(scaled["b"], tree["b"] / unit[:, None])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_largest_numbers_in_range(dtype):
    """Regression: the reciprocal of their power of two is subnormal, and they became zero."""
    tree = jnp.full((1, 2), jnp.finfo(dtype).max)
    unit, scaled = jax.jit(_tree.in_range)(tree)
    assert 1 <= float(_tree.norm(scaled)[0]) < 8
    np.testing.assert_array_equal(scaled * unit.astype(dtype)[:, None], tree)


@pytest.mark.parametrize("value", [2.0**-24, 2.0**-17, 65504.0])
def test_float16_in_range(value):
    """Regression: powers of two that float16 does not have became zero and infinity."""
    tree = {"a": jnp.full((1, 2), value, jnp.float16)}
    unit, scaled = _tree.in_range(tree)
    assert 0.5 <= scaled["a"][0, 0] < 2
    again = _tree.scale(unit, scaled)
    assert again["a"].dtype == jnp.float16
    np.testing.assert_array_equal(again["a"], tree["a"])


def test_sums_of_narrow_dtypes_are_taken_in_float32():
    ones = jnp.ones((2, 4096), jnp.bfloat16)
    assert _tree.dot(ones, ones).dtype == jnp.float32
    np.testing.assert_array_equal(_tree.dot(ones, ones), 4096)  # bfloat16 would stop at 256
    assert _tree.norm({"a": ones, "b": ones.astype(jnp.float64)}).dtype == jnp.float64


def test_a_tree_is_joined_and_split_again():
    a = {
        "a": jnp.arange(6.0).reshape(3, 2),
        "b": [jnp.ones((3, 0)), jnp.zeros((3, 2, 1), "bfloat16")],
    }
    joined = _tree.join(a)
    np.testing.assert_array_equal(joined, flat(a))
    again = _tree.split_like(joined, a)
    assert jax.tree.map(lambda v: v.dtype, again) == jax.tree.map(lambda v: v.dtype, a)
    jax.tree.map(np.testing.assert_array_equal, again, a)


def test_elementwise_operations_keep_dtypes():
    a = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones((3, 1), jnp.float32)}
    b = jax.tree.map(lambda v: 3 * v, a)
    factor = jnp.array([1.0, 2.0, 0.0])
    for result in (
        _tree.scale(factor, a),
        _tree.relax(a, b, 0.5),
        _tree.select(factor > 0, a, b),
        _tree.cast_like(jax.tree.map(lambda v: v.astype(jnp.float64), a), a),
    ):
        assert jax.tree.map(lambda v: v.dtype, result) == jax.tree.map(lambda v: v.dtype, a)
    np.testing.assert_array_equal(_tree.scale(factor, a)["a"][:, 0], [1, 2, 0])
    np.testing.assert_array_equal(_tree.relax(a, b, 0.5)["b"], 2)
    assert _tree.relax(a, b, 1) is b
    np.testing.assert_array_equal(_tree.select(factor > 1, a, b)["b"][:, 0], [3, 1, 3])
