"""The same auto-decoder trained by nested solves: what the joint solve replaces.

Every training step finds its images' latents by gradient descent through the network, a full
forward and a full adjoint solve for each step on x, and follows the envelope gradient there, as
the joint training does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jdeq
from experiments.common.data import ImageData, Split, batches
from experiments.common.optimisers import cosine_adam
from experiments.common.runs import RunDirectory
from experiments.common.step import Given, Measured, TrainState, Update, training_step
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

PyTree = Any

PART = "nested"


def initial_state(config: Config, params: PyTree, seed: int) -> TrainState:
    """What training starts from, given the initial parameters."""
    return TrainState.start(params, outer_optimizer(config, config.nested_steps), seed)


def train_nested(config: Config, run: RunDirectory, data: ImageData) -> None:
    """Train to the last step, from the newest checkpoint if there is one."""
    seed = run.record.seed
    generator, params = build_generator(config, data.shape, seed, mean_image(data))
    fit(
        step_of(config, generator),
        initial_state(config, params, seed),
        batches(data.train, config.batch_size, seed),
        run.part(PART),
        Schedule(config.nested_steps, config.log_every, config.checkpoint_every),
    )


def step_of(config: Config, generator: Generator) -> Update:
    """The training step."""

    def loss(params: PyTree, given: Given) -> tuple[Array, Measured]:
        images, keys = augmented(config, given.batch["image"], given.keys)
        return nested_loss(params, generator, config, images, keys)

    return training_step(
        jax.grad(loss, has_aux=True),
        outer_optimizer(config, config.nested_steps),
        contract=generator.contract,
    )


def nested_loss(
    params: PyTree, generator: Generator, config: Config, images: Array, keys: Array
) -> tuple[Array, Measured]:
    """Mean optimal objective plus the Jacobian penalty, as `training_loss` of the joint training.

    The gradient is that of the Lagrangian `l + mu . f` at the solution of the nested solve.
    """
    solution = solve_nested(
        generator, params, images, config.nested_inner_steps, config.inner_step_size
    )
    z, x, mu = jax.lax.stop_gradient(solution.value)
    objective = generator.problem.objective(params, z, x, images)
    moved = generator.problem.cell(params, z, x)
    coupling = sum(
        jnp.vdot(m, f) for m, f in zip(jax.tree.leaves(mu), jax.tree.leaves(moved), strict=True)
    )
    lagrangian = jnp.mean(objective) + coupling / len(images)
    if config.jacobian_weight:
        penalty = jdeq.regularization.jacobian_frobenius(
            generator.problem.cell, params, z, x, keys, probes=config.jacobian_probes
        )
        lagrangian += config.jacobian_weight * jnp.mean(penalty)
    error = jnp.mean(squared_error(generator.decode(params, z), images))
    means = {"loss": jnp.mean(objective), "mean_squared_error": error / images[0].size}
    medians = {"kkt_stationarity": solution.residual.stationarity}
    return lagrangian, Measured(means, medians)


def solve_nested(
    generator: Generator, params: PyTree, images: Array, steps: int, rate: float
) -> jdeq.Solution:
    """The nested solve of a batch: cosine-decayed Adam on x, each inner solve from the last."""
    x0, z0 = generator.start(params, len(images))
    return jdeq.nested_solve(
        generator.problem,
        params,
        images,
        x0,
        z0,
        optimizer=cosine_adam(rate, steps),
        max_steps=steps,
    )


def nested_error(generator: Generator, params: PyTree, split: Split, config: Config) -> np.ndarray:
    """Sum of squared errors, [N], of images whose latents the nested solve finds."""
    size = min(config.evaluation_batch, len(split))
    errors = []
    for images in split.in_batches(size):
        targets = jnp.asarray(filled(images, size))
        x = solve_nested(
            generator, params, targets, config.evaluation_nested_steps, config.inner_step_size
        ).value.x
        found = squared_error(generator.images(params, x), targets)
        errors.append(np.asarray(found)[: len(images)])
    return np.concatenate(errors)


def load_nested(
    config: Config, run: RunDirectory, shape: tuple[int, int, int]
) -> tuple[Generator, PyTree, float]:
    """The generator that nested solves trained, its parameters, and the seconds that it took.

    Raises:
        UserError: It has no checkpoint yet, or the images are not of the size trained on.
    """
    generator, params = build_generator(config, shape, run.record.seed)
    template = jax.eval_shape(lambda: initial_state(config, params, run.record.seed))
    restored = restore_part(run, PART, template)
    return generator, restored.state.params, restored.notes["seconds"]
