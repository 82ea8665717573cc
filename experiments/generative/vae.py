"""The variational autoencoder with the generator as its decoder: a baseline of the study.

The encoder proposes a normal distribution of latents, the decoder is the same equilibrium network
that the joint solve trains. Its loss is the squared error of the image plus the weighted
Kullback-Leibler divergence from the standard normal distribution, warmed up (Kingma and Welling,
2014).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import jdeq
from experiments.common.data import ImageData, batches
from experiments.common.runs import RunDirectory
from experiments.common.step import (
    Given,
    Measured,
    TrainState,
    Update,
    split_each,
    training_step,
)
from experiments.common.training import Schedule, fit
from experiments.generative.augmentation import augmented
from experiments.generative.config import Config
from experiments.generative.inference import filled
from experiments.generative.problem import (
    Generator,
    build_generator,
    mean_image,
    outer_optimizer,
    restore_part,
    squared_error,
)
from jdeq.nn import Conv

PyTree = Any

PART = "vae"
_WARM_UP = 0.1  # share of the training over which the divergence is warmed up
_EQUILIBRIUM_RTOL = 1e-3  # of the decoder's solves in training
_EQUILIBRIUM_STEPS = 50
_ENCODED = 256  # images a batch


class Encoder(nnx.Module):
    """Images to the mean and the log-variance of their latents.

    A convolution of stride 2 and a silu for each entry of `channels`, two hidden layers, and a
    linear one.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        latent_dim: int,
        width: int,
        channels: tuple[int, ...],
        rngs: nnx.Rngs,
    ):
        height, wide, depth = image_shape
        convolutions = []
        for count in channels:
            convolutions.append(Conv(depth, count, 3, stride=2, use_bias=True, rngs=rngs))
            height, wide, depth = math.ceil(height / 2), math.ceil(wide / 2), count
        self.convolutions = nnx.List(convolutions)
        self.first = nnx.Linear(height * wide * depth, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 2 * latent_dim, rngs=rngs)

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """(mean, log-variance), [B, latent_dim] each, of images [B, H, W, C]."""
        y = images
        for convolution in self.convolutions:
            y = jax.nn.silu(convolution(y))
        y = jax.nn.silu(self.first(y.reshape(len(y), -1)))
        mean, log_variance = jnp.split(self.last(jax.nn.silu(self.second(y))), 2, axis=-1)
        return mean, log_variance


class Parameters(NamedTuple):
    """Parameters of both halves."""

    generator: PyTree
    encoder: PyTree


@dataclass(frozen=True, eq=False)
class VAE:
    """The autoencoder without its parameters."""

    generator: Generator
    graph: nnx.GraphDef

    def encode(self, params: Parameters, images: Array) -> tuple[Array, Array]:
        """(mean, log-variance), [B, latent_dim] each."""
        return nnx.merge(self.graph, params.encoder)(images)

    def reconstruct(self, params: Parameters, batches: Iterable[np.ndarray]) -> np.ndarray:
        """The images of the encoder's means, [N, H, W, C]; all batches but the last as large."""
        parts = []
        size = None
        for images in batches:
            size = len(images) if size is None else size
            x, _ = _encode(self, params, filled(images, size))
            parts.append(np.asarray(self.generator.images(params.generator, x))[: len(images)])
        return np.concatenate(parts)

    def latents(self, params: Parameters, images: np.ndarray) -> np.ndarray:
        """The encoder's means of many images: [N, latent_dim]."""
        chunks = (images[i : i + _ENCODED] for i in range(0, len(images), _ENCODED))
        return np.concatenate([np.asarray(_encode(self, params, chunk)[0]) for chunk in chunks])


@partial(jax.jit, static_argnums=0)
def _encode(vae: VAE, params: Parameters, images: Array) -> tuple[Array, Array]:
    return vae.encode(params, images)


def build_vae(
    config: Config, image_shape: tuple[int, int, int], seed: int, mean: Array | None = None
) -> tuple[VAE, Parameters]:
    """The autoencoder of the settings and its initial parameters; see `build_generator`."""
    generator, params = build_generator(config, image_shape, seed, mean)
    encoder = Encoder(
        image_shape,
        latent_dim=config.latent_dim,
        width=config.decoder_hidden,
        channels=config.channels,
        rngs=nnx.Rngs(seed),
    )
    graph, encoder_params = nnx.split(encoder)
    return VAE(generator, graph), Parameters(params, encoder_params)


def initial_state(config: Config, params: Parameters, seed: int) -> TrainState:
    """What training starts from, given the initial parameters."""
    return TrainState.start(params, outer_optimizer(config, config.vae_steps), seed)


def train_vae(config: Config, run: RunDirectory, data: ImageData) -> None:
    """Train to the last step, from the newest checkpoint if there is one."""
    seed = run.record.seed
    vae, params = build_vae(config, data.shape, seed, mean_image(data))
    fit(
        step_of(config, vae),
        initial_state(config, params, seed),
        batches(data.train, config.batch_size, seed),
        run.part(PART),
        Schedule(config.vae_steps, config.log_every, config.checkpoint_every),
    )


def step_of(config: Config, vae: VAE) -> Update:
    """The training step."""

    def loss(params: Parameters, given: Given) -> tuple[Array, Measured]:
        images, keys = augmented(config, given.batch["image"], given.keys)
        return vae_loss(params, vae, config, images, keys, given.step)

    def contract(params: Parameters) -> Parameters:
        return params._replace(generator=vae.generator.contract(params.generator))

    return training_step(
        jax.grad(loss, has_aux=True),
        outer_optimizer(config, config.vae_steps),
        contract=contract,
    )


def vae_loss(
    params: Parameters, vae: VAE, config: Config, images: Array, keys: Array, step: Array
) -> tuple[Array, Measured]:
    """Mean of squared error plus weighted divergence, plus the generator's Jacobian penalty.

    Args:
        params: Parameters.
        vae: Their networks.
        config: Settings.
        images: [B, H, W, C] in [0, 1].
        keys: PRNG keys of the latents and of the penalty's probes, [B].
        step: Training steps done, which the warm-up of the divergence goes by.

    Returns:
        (loss, metrics).
    """
    draws, probes = split_each(keys)
    mean, log_variance = vae.encode(params, images)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(draws)
    x = mean + jnp.exp(log_variance / 2) * noise
    generator, decoder = vae.generator, params.generator
    _, z0 = generator.start(decoder, len(images))
    cell = generator.problem.cell
    z = jdeq.deq(
        cell, decoder, x, z0, rtol=_EQUILIBRIUM_RTOL, atol=0.0, max_steps=_EQUILIBRIUM_STEPS
    ).value
    error = jnp.mean(squared_error(generator.decode(decoder, z), images))
    divergence = jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1) / 2
    warmth = jnp.minimum(1.0, step / (_WARM_UP * config.vae_steps))
    loss = error + warmth * config.kl_weight * jnp.mean(divergence)
    if config.jacobian_weight:
        penalty = jdeq.regularization.jacobian_frobenius(
            cell, decoder, z, x, probes, probes=config.jacobian_probes
        )
        loss += config.jacobian_weight * jnp.mean(penalty)
    means = {
        "loss": loss,
        "mean_squared_error": error / images[0].size,
        "divergence": jnp.mean(divergence),
    }
    return loss, Measured(means)


def load_vae(
    config: Config, run: RunDirectory, shape: tuple[int, int, int]
) -> tuple[VAE, Parameters, float]:
    """The autoencoder of a run, its parameters, and the seconds that its training took.

    Raises:
        UserError: It has no checkpoint yet, or the images are not of the size trained on.
    """
    vae, params = build_vae(config, shape, run.record.seed)
    template = jax.eval_shape(lambda: initial_state(config, params, run.record.seed))
    restored = restore_part(run, PART, template)
    return vae, restored.state.params, restored.notes["seconds"]
