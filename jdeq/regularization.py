"""Penalties and measures of a cell's Jacobian at its equilibrium."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree

PyTree = Any


def jacobian_frobenius(
    cell: Callable[..., PyTree],
    params: PyTree,
    z: PyTree,
    x: PyTree,
    key: Array,
    *,
    data: PyTree = None,
    probes: int = 1,
) -> Array:
    """Hutchinson estimate of ``||df/dz||_F^2 / dim z`` per problem (Bai, Koltun, Kolter 2021).

    For Gaussian ``v``, ``E ||v^T J||^2 = ||J||_F^2``: one vector-Jacobian product a probe. It is
    differentiable in everything; as a training penalty it is usually taken at a constant ``z``
    (``jax.lax.stop_gradient``).

    Args:
        cell: ``cell(params, z, x[, data]) -> z``.
        params: its parameters.
        z: where the Jacobian is taken, every leaf ``[B, ...]``.
        x: its inputs, every leaf ``[B, ...]``.
        key: a PRNG key for the probes.
        data: its further constants.
        probes: number of probes averaged, at least 1.

    Returns:
        One estimate a problem, ``[B]``, at least 0.

    Raises:
        ValueError: if ``probes`` is below 1.
    """
    _options.check_count("jacobian_frobenius", "probes", probes)
    rest = () if data is None else (data,)
    _, pull_back = jax.vjp(lambda z: cell(params, z, x, *rest), z)
    leaves, tree = jax.tree.flatten(z)
    dimension = sum(leaf[0].size for leaf in leaves)

    def estimate(key: Array) -> Array:
        keys = jax.random.split(key, len(leaves))
        probe = jax.tree.unflatten(
            tree,
            [jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves, strict=True)],
        )
        (product,) = pull_back(probe)
        return _tree.dot(product, product) / dimension

    return jnp.mean(jax.vmap(estimate)(jax.random.split(key, probes)), axis=0)
