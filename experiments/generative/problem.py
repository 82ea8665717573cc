"""The input problem of the task: find the latent code whose image comes nearest to the target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import jdeq
from experiments.common.checkpoints import Restored, restore_newest
from experiments.common.data import ImageData
from experiments.common.errors import UserError
from experiments.common.runs import RunDirectory
from experiments.generative.config import Config
from experiments.generative.model import DenseGenerator, MultiscaleGenerator

PyTree = Any

_EQUILIBRIUM_RTOL = 1e-6
_MEAN_IMAGES = 1000  # whose mean a generator starts from


@dataclass(frozen=True, eq=False)
class Generator:
    """A generator network without its parameters.

    Attributes:
        graph: The network's structure.
        problem: Minimise over x the squared error of the image plus `latent_penalty ||x||^2`.
        latent_dim: Dimension of x.
    """

    graph: nnx.GraphDef
    problem: jdeq.InputProblem
    latent_dim: int

    def decode(self, params: PyTree, z: PyTree) -> Array:
        """The images of equilibria: [B, H, W, C] in [0, 1]."""
        return nnx.merge(self.graph, params).decode(z)

    def contract(self, params: PyTree) -> PyTree:
        """The parameters of the nearest network whose cell is as contractive as it has to be."""
        model = nnx.merge(self.graph, params)
        model.contract()
        return nnx.state(model)

    def images(self, params: PyTree, x: Array) -> Array:
        """What the generator makes of latents at their equilibria: [B, H, W, C] in [0, 1]."""
        return _images(self, params, x)

    def start(self, params: PyTree, count: int) -> tuple[Array, PyTree]:
        """(x0, z0) of `count` problems."""
        z0 = nnx.merge(self.graph, params).initial_state(count)
        return jnp.zeros((count, self.latent_dim)), z0


def build_generator(
    config: Config,
    image_shape: tuple[int, int, int],
    seed: int,
    mean_image: Array | None = None,
) -> tuple[Generator, PyTree]:
    """The generator of the settings and its initial parameters.

    Args:
        config: Settings.
        image_shape: (height, width, channels).
        seed: Of the initial parameters.
        mean_image: What a dense generator decodes at first, in [0, 1]; None is mid-grey.
    """
    rngs, state_dtype = nnx.Rngs(seed), jnp.dtype(config.state_dtype)
    model: DenseGenerator | MultiscaleGenerator
    if config.generator == "dense":
        model = DenseGenerator(
            image_shape,
            latent_dim=config.latent_dim,
            hidden=config.hidden,
            decoder_hidden=config.decoder_hidden,
            contraction=config.contraction,
            rngs=rngs,
            mean_image=mean_image,
            state_dtype=state_dtype,
        )
    else:
        model = MultiscaleGenerator(
            image_shape,
            latent_dim=config.latent_dim,
            channels=config.channels,
            rngs=rngs,
            state_dtype=state_dtype,
        )
    graph, params = nnx.split(model)

    def cell(params: PyTree, z: PyTree, x: Array) -> PyTree:
        return nnx.merge(graph, params).cell(z, x)

    def objective(params: PyTree, z: PyTree, x: Array, images: Array) -> Array:
        error = squared_error(nnx.merge(graph, params).decode(z), images)
        return error + config.latent_penalty * jnp.sum(x**2, axis=-1)

    return Generator(graph, jdeq.InputProblem(cell, objective), config.latent_dim), params


def squared_error(images: Array, targets: Array) -> Array:
    """Sum of squared differences of each image: [B]."""
    return jnp.sum((images - targets) ** 2, axis=(1, 2, 3))


def training_method(config: Config) -> jdeq.joint.Descent:
    """Adam on x inside the augmented map, its step decayed by a cosine."""
    return jdeq.joint.Descent(step_size=config.inner_step_size)


def outer_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, its rate falling to zero along a cosine over `steps`."""
    rate = optax.cosine_decay_schedule(config.learning_rate, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )


def mean_image(data: ImageData) -> Array:
    """The mean of the first training images, which a generator starts from: [H, W, C]."""
    return jnp.mean(data.train.first(_MEAN_IMAGES), axis=0)


def restore_part(run: RunDirectory, part: str, template: PyTree) -> Restored:
    """The newest undamaged checkpoint of a further model of a run.

    Raises:
        UserError: There is none yet, or the images are not of the size trained on.
    """
    restored = restore_newest(run.path / part / "checkpoints", template, discard=False)
    if restored is None:
        raise UserError(
            f"{run.path / part} has no checkpoint yet; train first with `python -m "
            f"experiments.{run.record.task} train --run-dir {run.path} --resume`."
        )
    return restored


@partial(jax.jit, static_argnums=0)
def _images(generator: Generator, params: PyTree, x: Array) -> Array:
    _, z0 = generator.start(params, len(x))
    solution = jdeq.deq(
        generator.problem.cell, params, x, z0, rtol=_EQUILIBRIUM_RTOL, atol=0.0, max_steps=300
    )
    return generator.decode(params, solution.value)
