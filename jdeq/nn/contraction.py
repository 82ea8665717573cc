"""Keeping a linear map a contraction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _tree

_ITERATIONS = 20


def spectral_norm(kernel: Array, *, iterations: int = _ITERATIONS) -> Array:
    """The largest singular value of a matrix, by power iteration on ``K^T K``.

    The estimate comes from below, and its relative error falls like the ratio of the two largest
    singular values to the power of four times the iterations (Golub and Van Loan 2013, section
    8.2).

    Args:
        kernel: ``[m, n]``, floating.
        iterations: at least 1; each costs two matrix-vector products.

    Returns:
        A scalar of the kernel's dtype.

    Raises:
        ValueError: if ``kernel`` is not a matrix, or ``iterations < 1``.
    """
    if kernel.ndim != 2:
        raise ValueError(
            f"spectral_norm: a kernel of shape {kernel.shape} was given, but a matrix is expected; "
            f"reshape it to the linear map that it stands for."
        )
    if iterations < 1:
        raise ValueError(
            f"spectral_norm: iterations={iterations} was given, but at least 1 is expected."
        )

    # Squares of very small and very large entries would leave the range of the dtype.
    (unit,), (kernel,) = _tree.in_range(kernel[None])

    def step(_: Array, direction: Array) -> Array:
        moved = kernel.T @ (kernel @ direction)
        length = jnp.linalg.norm(moved)
        return jnp.where(length > 0, moved / jnp.where(length > 0, length, 1), direction)

    first = jax.random.normal(jax.random.key(0), kernel.shape[1:], kernel.dtype)
    direction = jax.lax.fori_loop(0, iterations, step, first / jnp.linalg.norm(first))
    return unit.astype(kernel.dtype) * jnp.linalg.norm(kernel @ direction)


def limit_spectral_norm(
    kernel: Array, bound: float | Array, *, iterations: int = _ITERATIONS
) -> Array:
    """The kernel, scaled down where its spectral norm exceeds a bound.

        K min(1, bound / ||K||_2)

    Applied to the recurrent kernel after each training step, with a bound below one and an
    activation of slope at most one, it keeps ``z = activation(K z + ...)`` a contraction: it has
    one equilibrium, and every solver that converges on contractions finds it.

    Args:
        kernel: ``[m, n]``, floating.
        bound: positive.
        iterations: of the power iteration that measures the norm.

    Returns:
        A kernel of the same shape and dtype.

    Raises:
        ValueError: as ``spectral_norm``.
    """
    norm = spectral_norm(kernel, iterations=iterations)
    return kernel * jnp.minimum(1, bound / jnp.where(norm > 0, norm, 1)).astype(kernel.dtype)
