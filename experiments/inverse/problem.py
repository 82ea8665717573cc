"""The input problem: the latent whose image, seen as the observation was, comes nearest to it.

    minimise over u:   ||see(image(z*)) - observed||^2 + penalty ||u||^2,   x = centre + factor u

with `u` standardised by the normal distribution of the training images' latents. With Gaussian
noise and `penalty` its variance, the minimum is the most probable latent given the observation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

import jdeq
from experiments.generative.problem import Generator
from experiments.inverse.measurements import measure

PyTree = Any

_LEAST_VARIANCE = 1e-4  # of a latent's principal component, relative to the mean of all


class Prior(NamedTuple):
    """A normal distribution of latents, `x = centre + factor u` with u standard normal.

    Attributes:
        centre: [latent_dim].
        factor: [latent_dim, latent_dim].
    """

    centre: Array
    factor: Array

    @classmethod
    def standard(cls, latent_dim: int) -> Prior:
        """The standard normal distribution, an autoencoder's own prior."""
        return cls(jnp.zeros(latent_dim), jnp.eye(latent_dim))

    @classmethod
    def of(cls, latents: np.ndarray) -> Prior:
        """The normal distribution fitted to latents [N, latent_dim]."""
        latents = latents.astype(np.float64)
        variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(latents, rowvar=False)))
        spread = np.sqrt(np.maximum(variances, _LEAST_VARIANCE * variances.mean()))
        return cls(
            jnp.asarray(latents.mean(axis=0), jnp.float32),
            jnp.asarray((axes * spread) @ axes.T, jnp.float32),
        )

    def latents(self, u: Array) -> Array:
        """The latents x, [B, latent_dim], of standardised ones."""
        return self.centre + u @ self.factor.T


class Parameters(NamedTuple):
    """Parameters of an inverse problem: of the generator, and the prior of its latents."""

    generator: PyTree
    prior: Prior


def inverse_problem(
    generator: Generator, see: Callable[[Any, Array], Array] = measure
) -> jdeq.InputProblem:
    """The input problem over u, whose data is `(how, penalty)`, the penalty [B].

    Args:
        generator: The network.
        see: `see(how, images)`, any differentiable function of images [B, H, W, C] that treats
            them one by one; the first axis of how and of its values is B.
    """

    def cell(params: Parameters, z: PyTree, u: Array, data: PyTree) -> PyTree:
        del data
        return generator.problem.cell(params.generator, z, params.prior.latents(u))

    def objective(
        params: Parameters, z: PyTree, u: Array, observed: Array, data: tuple[PyTree, Array]
    ) -> Array:
        how, penalty = data
        difference = see(how, generator.decode(params.generator, z)) - observed
        error = jnp.sum(difference.reshape(len(u), -1) ** 2, axis=-1)
        return error + penalty * jnp.sum(u**2, axis=-1)

    return jdeq.InputProblem(cell, objective)
