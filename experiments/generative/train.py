"""Training: every step solves for its images' latent codes, and follows the envelope gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jdeq
from experiments.common.accuracy import estimated_errors
from experiments.common.data import ImageData, batches, load_images
from experiments.common.runs import RunDirectory
from experiments.common.step import Given, Measured, TrainState, Update, training_step
from experiments.common.terminal import say
from experiments.common.training import Schedule, fit
from experiments.generative.augmentation import augmented
from experiments.generative.classifier import train_classifier
from experiments.generative.config import Config
from experiments.generative.nested_training import train_nested
from experiments.generative.problem import (
    Generator,
    build_generator,
    mean_image,
    outer_optimizer,
    squared_error,
    training_method,
)
from experiments.generative.vae import train_vae
from jdeq.joint import StartStore, starts

PyTree = Any


class Memory(NamedTuple):
    """What training keeps besides parameters and optimiser.

    Attributes:
        latents: The last x of training images; None without warm starts.
        accuracy: State of the `AccuracyControl`; None without one.
    """

    latents: StartStore | None
    accuracy: Array | None


def train(config: Config, run: RunDirectory, data_root: Path | None) -> None:
    """Train every model of the study to its last step, each from its newest checkpoint.

    The joint training comes last: a run is trained once it has ended.
    """
    data = load_images(config.dataset, data_root, config.image_size)
    if data.train.labels is not None:
        say("training the classifier whose features compare distributions")
        train_classifier(config, run, data)
    say("training the variational autoencoder")
    train_vae(config, run, data)
    say("training the same generator by nested solves")
    train_nested(config, run, data)
    say("training the generator by joint solves")
    train_joint(config, run, data)


def train_joint(config: Config, run: RunDirectory, data: ImageData) -> None:
    """Train the generator to the last step, from the newest checkpoint if there is one."""
    seed = run.record.seed
    generator, params = build_generator(config, data.shape, seed, mean_image(data))
    fit(
        step_of(config, generator),
        initial_state(config, params, seed),
        batches(data.train, config.batch_size, seed),
        run,
        Schedule(config.steps, config.log_every, config.checkpoint_every),
    )


def step_of(config: Config, generator: Generator) -> Update:
    """The training step."""
    control = config.accuracy_control

    def loss(params: PyTree, given: Given) -> tuple[Array, Measured]:
        x0 = starting_latents(given.memory.latents, generator, params, given.batch)
        images, keys = augmented(config, given.batch["image"], given.keys)
        if control is None:
            return training_loss(params, generator, config, images, keys, x0)
        budget = control.iterations(given.memory.accuracy)
        value, measured = training_loss(params, generator, config, images, keys, x0, budget)
        return value, _with_accuracy(measured, budget, control.allowed(given.step))

    def remember(given: Given, found: jdeq.Solution) -> Memory:
        latents, state = given.memory
        if latents is not None:
            latents = starts.update(latents, given.batch["index"], found)
        if control is not None:
            state = control.adjusted(state, estimated_errors(found), given.step)
        return Memory(latents, state)

    return training_step(
        jax.grad(loss, has_aux=True),
        outer_optimizer(config, config.steps),
        contract=generator.contract,
        remember=remember if config.warm_starts or control else None,
    )


def _with_accuracy(measured: Measured, budget: Array, allowed: Array) -> Measured:
    return Measured(
        measured.means | {"inner_steps": budget.astype(allowed.dtype), "error_allowed": allowed},
        measured.medians | {"error_estimated": estimated_errors(measured.found)},
        measured.found,
    )


def initial_state(config: Config, params: PyTree, seed: int) -> TrainState:
    """What training starts from, given the initial parameters; its memory is a `Memory`."""
    latents = None
    if config.warm_starts:
        like = jdeq.AugmentedState(None, jnp.zeros((1, config.latent_dim)), None)
        latents = starts.init(like, config.warm_starts, keep=("x",))
    control = config.accuracy_control
    memory = Memory(latents, None if control is None else control.start())
    return TrainState.start(params, outer_optimizer(config, config.steps), seed, memory)


def starting_latents(
    latents: StartStore | None, generator: Generator, params: PyTree, batch: dict[str, Array]
) -> Array:
    """The first x of a batch: what each image's last solve found, or zero."""
    x0, _ = generator.start(params, len(batch["image"]))
    if latents is None:
        return x0
    return starts.lookup(latents, batch["index"], jdeq.AugmentedState(None, x0, None)).x


def training_loss(
    params: PyTree,
    generator: Generator,
    config: Config,
    images: Array,
    keys: Array,
    x0: Array,
    step_budget: Array | None = None,
) -> tuple[Array, Measured]:
    """Mean optimal objective of the images, plus the Jacobian penalty at their equilibria.

    Args:
        params: Parameters of the generator.
        generator: Its network.
        config: Settings.
        images: [B, H, W, C] in [0, 1].
        keys: PRNG keys of the penalty's probes, [B].
        x0: First latents, [B, latent_dim].
        step_budget: Iterations of the joint solve where they are fewer than `inner_steps`.

    Returns:
        (loss, metrics and the input problems' solution); the gradient of the loss is the envelope
        gradient, exact up to the residuals among the metrics.
    """
    _, z0 = generator.start(params, len(images))
    values, solution = jdeq.input_value(
        generator.problem,
        params,
        images,
        x0,
        jax.lax.stop_gradient(z0),
        method=training_method(config),
        max_steps=config.inner_steps,
        step_budget=step_budget,
    )
    z, x, _ = solution.value
    jacobian = jnp.mean(
        jdeq.regularization.jacobian_frobenius(
            generator.problem.cell, params, z, x, keys, probes=config.jacobian_probes
        )
    )
    loss = jnp.mean(values) + config.jacobian_weight * jacobian
    error = jnp.mean(squared_error(generator.decode(params, z), images)) / images[0].size
    means = {
        "loss": loss,
        "objective": jnp.mean(values),
        "mean_squared_error": error,
        "jacobian": jacobian,
        "failed": jnp.mean(solution.result >= jdeq.Result.diverged),
    }
    medians = {f"kkt_{block}": each for block, each in solution.residual._asdict().items()}
    return loss, Measured(means, medians, solution)
