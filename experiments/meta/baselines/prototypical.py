"""Prototypical networks (Snell et al., 2017) and nearest neighbours, which learn nothing."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

PyTree = Any


def prototypical(
    graph: nnx.GraphDef, params: PyTree, support: Array, target: Array, query: Array
) -> Array:
    """Scores [B, m, N]: minus the squared distance to the mean features of each class."""
    model = nnx.merge(graph, params)

    def features(examples: Array) -> Array:
        flat = model.body(examples.reshape(-1, *examples.shape[2:]))
        return flat.reshape(*examples.shape[:2], -1)

    shares = target / jnp.sum(target, axis=1, keepdims=True)
    prototypes = jnp.einsum("bnk,bnd->bkd", shares, features(support))
    distance = _squared_distances(features(query), prototypes) / prototypes.shape[-1]
    return -jnp.exp(model.log_temperature[...]) * distance


def nearest_neighbour(support: Array, target: Array, query: Array) -> Array:
    """Scores [B, m, N]: minus the squared distance to the nearest support image of each class."""
    tasks, n = support.shape[:2]
    distance = _squared_distances(
        query.reshape(tasks, query.shape[1], -1), support.reshape(tasks, n, -1)
    )
    of_class = jnp.where(target[:, None] > 0, distance[..., None], jnp.inf)
    return -jnp.min(of_class, axis=2)


def _squared_distances(a: Array, b: Array) -> Array:
    """[B, m, n] of a [B, m, D] and b [B, n, D]."""
    products = jnp.einsum("bmd,bnd->bmn", a, b)
    return jnp.sum(a**2, -1)[:, :, None] - 2 * products + jnp.sum(b**2, -1)[:, None]
