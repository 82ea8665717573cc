"""Spectral norms against the singular value decomposition, and kernels kept below a bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdeq.nn import limit_spectral_norm, spectral_norm


def with_singular_values(values, rows=7):
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return jnp.asarray(left[:, : len(values)] @ np.diag(values) @ right)


@pytest.mark.parametrize(
    "values",
    [
        [3.0, 1.0, 0.5],
        [2.0, 2.0, 0.1],
        [1e-8, 1e-9],
        [1e8, 1.0],
        [1e-150, 1e-152],
        [1e150, 1e148],
    ],
)
def test_spectral_norm_is_the_largest_singular_value(values):
    kernel = with_singular_values(values)
    got = jax.jit(spectral_norm)(kernel)
    np.testing.assert_allclose(got, np.linalg.norm(kernel, 2), rtol=1e-10)


def test_a_random_kernel_stays_within_a_percent_of_its_bound():
    kernel = jax.random.normal(jax.random.key(1), (200, 200))
    limited = limit_spectral_norm(kernel, 0.9)
    norm = np.linalg.norm(limited, 2)
    assert 0.9 <= norm < 0.909
    np.testing.assert_allclose(limited / limited[0, 0], kernel / kernel[0, 0], rtol=1e-10)


def test_a_kernel_below_its_bound_is_kept():
    kernel = with_singular_values([0.5, 0.4])
    np.testing.assert_array_equal(limit_spectral_norm(kernel, 0.9), kernel)
    np.testing.assert_array_equal(limit_spectral_norm(jnp.zeros((3, 3)), 0.9), np.zeros((3, 3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
    assert limit_spectral_norm(jnp.ones((3, 3), dtype), 0.5).dtype == dtype


def test_derivatives_under_vmap():
    """Of the norm: the outer product of its singular vectors."""
    kernel = with_singular_values([3.0, 1.0])
    u, _, v = np.linalg.svd(kernel)
    got = jax.vmap(jax.grad(spectral_norm))(jnp.stack([kernel, 2 * kernel]))
    np.testing.assert_allclose(got, np.broadcast_to(np.outer(u[:, 0], v[0]), got.shape), atol=1e-8)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="a matrix is expected"):
        spectral_norm(jnp.ones((3, 3, 2)))
    with pytest.raises(ValueError, match="at least 1 is expected"):
        spectral_norm(jnp.ones((3, 3)), iterations=0)
