"""The auxiliary autoencoder of the published sampling: it compresses standardised latents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

PyTree = Any

_WIDTH = 128
_STEPS = 2000
_BATCH = 128
_RATE = 1e-3
_WARM_UP = 0.25  # share of the steps over which the divergence is warmed up
_DIVERGENCE = 0.1  # its weight: codes that keep most of what the latents vary by


class _Network(nnx.Module):
    """Two layers each way; the code has half the entries of a latent."""

    def __init__(self, latent_dim: int, *, rngs: nnx.Rngs):
        self.code_dim = max(1, latent_dim // 2)
        self.hidden = nnx.Linear(latent_dim, _WIDTH, rngs=rngs)
        self.code = nnx.Linear(_WIDTH, 2 * self.code_dim, rngs=rngs)
        self.expand = nnx.Linear(self.code_dim, _WIDTH, rngs=rngs)
        self.latent = nnx.Linear(_WIDTH, latent_dim, rngs=rngs)

    def encode(self, latents: Array) -> tuple[Array, Array]:
        """(mean, log-variance) of codes."""
        mean, log_variance = jnp.split(self.code(jax.nn.silu(self.hidden(latents))), 2, axis=-1)
        return mean, log_variance

    def decode(self, codes: Array) -> Array:
        """Standardised latents of codes."""
        return self.latent(jax.nn.silu(self.expand(codes)))


@dataclass(frozen=True, eq=False)
class LatentVAE:
    """A fitted autoencoder of standardised latents."""

    graph: nnx.GraphDef
    params: PyTree

    @classmethod
    def fit(cls, latents: np.ndarray, seed: int) -> LatentVAE:
        """Train on standardised latents, float32 [N, latent_dim]."""
        graph, params = nnx.split(_Network(latents.shape[1], rngs=nnx.Rngs(seed)))
        trained = _train(graph, params, jnp.asarray(latents), jax.random.key(seed))
        return cls(graph, trained)

    def encode(self, latents: np.ndarray) -> np.ndarray:
        """Means of the codes, [N, code_dim]."""
        return np.asarray(nnx.merge(self.graph, self.params).encode(jnp.asarray(latents))[0])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Standardised latents, [N, latent_dim]."""
        return np.asarray(nnx.merge(self.graph, self.params).decode(jnp.asarray(codes)))


@partial(jax.jit, static_argnums=0)
def _train(graph: nnx.GraphDef, params: PyTree, latents: Array, key: Array) -> PyTree:
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

    def loss(params: PyTree, batch: Array, key: Array, weight: Array) -> Array:
        network = nnx.merge(graph, params)
        mean, log_variance = network.encode(batch)
        code = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        error = jnp.sum((network.decode(code) - batch) ** 2, axis=-1)
        divergence = jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1) / 2
        return jnp.mean(error + weight * divergence)

    def step(
        state: tuple[PyTree, optax.OptState, Array], number: Array
    ) -> tuple[tuple[PyTree, optax.OptState, Array], None]:
        params, memory, key = state
        key, choice, noise = jax.random.split(key, 3)
        batch = latents[jax.random.randint(choice, (_BATCH,), 0, len(latents))]
        weight = _DIVERGENCE * jnp.minimum(1.0, number / (_WARM_UP * _STEPS))
        updates, memory = optimizer.update(jax.grad(loss)(params, batch, noise, weight), memory)
        return (optax.apply_updates(params, updates), memory, key), None

    start = (params, optimizer.init(params), key)
    return jax.lax.scan(step, start, jnp.arange(_STEPS))[0][0]
