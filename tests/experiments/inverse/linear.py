"""A linear generator, whose inverse problems are linear regressions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jdeq
from experiments.generative.problem import Generator
from experiments.inverse.prior import Prior
from experiments.inverse.problem import Parameters

BASIS = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 3)))[0].astype(np.float32)
PRIOR = Prior.standard(3)._replace(
    centre=jnp.array([0.3, -0.2, 0.1]), factor=jnp.diag(jnp.array([0.4, 0.3, 0.2]))
)
SHAPE = (4, 3, 1)


class Linear(nnx.Module):
    """Equilibrium z = x / (1 - 0.3), image 1/2 + B z."""

    def __init__(self):
        self.basis = nnx.Param(jnp.asarray(BASIS))

    def decode(self, z):
        return (0.5 + z @ self.basis[...].T).reshape(-1, *SHAPE)

    def initial_state(self, count):
        return jnp.zeros((count, 3))

    def contract(self):
        pass


def linear():
    """The generator, and its parameters with the prior."""
    graph, params = nnx.split(Linear())
    problem = jdeq.InputProblem(lambda params, z, x: 0.3 * z + x, lambda *_: jnp.zeros(1))
    return Generator(graph, problem, 3), Parameters(params, PRIOR)


def latents(observed, matrix, penalty):
    """The x of the minimiser of ||A image(x) - observed||^2 + penalty ||u||^2."""
    centre, factor = (np.asarray(part, np.float64) for part in PRIOR[:2])
    image = BASIS.astype(np.float64) / 0.7
    design = matrix @ image @ factor
    rest = observed - matrix @ (0.5 + image @ centre)
    u = np.linalg.solve(design.T @ design + penalty * np.eye(3), design.T @ rest)
    return centre + factor @ u


def image_of(x):
    """The generator's image of a latent, flat."""
    return 0.5 + BASIS.astype(np.float64) / 0.7 @ x


def images(count=4):
    """Images of the generator, in [0, 1]."""
    u = 0.3 * np.random.default_rng(1).normal(size=(count, 3))
    x = np.asarray(PRIOR.centre) + u @ np.asarray(PRIOR.factor).T
    return np.stack([image_of(one) for one in x]).reshape(count, *SHAPE).astype(np.float32)
