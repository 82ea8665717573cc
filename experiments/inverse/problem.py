"""The input problem: the latent whose image, seen as the observation was, comes nearest to it.

    minimise over u:   ||see(image(z*)) - observed||^2 + penalty E(u),   x = centre + factor u

with `u` standardised by the training images' latents and E twice the negative logarithm of their
density, see `experiments.inverse.prior`. With Gaussian noise and `penalty` its variance, the
minimum is the most probable latent given the observation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

import jdeq
from experiments.generative.problem import Generator
from experiments.inverse.measurements import measure
from experiments.inverse.prior import Prior

PyTree = Any


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
        return error + penalty * params.prior.energy(u)

    return jdeq.InputProblem(cell, objective)
