"""Training for the task: the latents fit what is observed, the images are to be the clean ones.

Every problem has its own copy of the generator. A step transforms the images as the generator's own
training did, corrupts them anew, solves for the latents given the corrupted ones alone, and follows
the gradient of the squared error to the clean ones: the exact one, through all iterations of the
joint solve, or the published one, to which the latents are constants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jdeq
from experiments.common.data import batches
from experiments.common.runs import RunDirectory, is_trained
from experiments.common.step import (
    Given,
    Measured,
    Metrics,
    TrainState,
    Update,
    split_each,
    training_step,
)
from experiments.common.terminal import say
from experiments.common.training import Schedule, fit
from experiments.common.unrolled import unrolled_solve
from experiments.generative.augmentation import augmented
from experiments.generative.problem import squared_error
from experiments.inverse.config import Config
from experiments.inverse.measurements import KINDS, Setting, corrupt, setting
from experiments.inverse.problem import Parameters, inverse_problem
from experiments.inverse.solvers import Solver
from experiments.inverse.source import Source, load_source, train_source
from experiments.inverse.tuning import Belief, choose_beliefs

PyTree = Any


def train(config: Config, run: RunDirectory, data_root: Path | None) -> None:
    """Train the models without a task, then those with, each from its newest checkpoint."""
    train_source(config, run, data_root)
    if is_trained(run):
        return
    source = load_source(config, run, data_root)
    say("fitting priors, and choosing one and its weight for each problem")
    found = choose_beliefs(
        source, source.joint, source.priors(config), config, Solver(source.generator)
    )
    beliefs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[found[name] for name in KINDS])
    say(f"training {len(KINDS)} generators for their tasks")
    fit(
        step_of(config, source),
        initial_state(config, source.joint, beliefs, run.record.seed),
        batches(source.data.train, config.batch_size, run.record.seed),
        run,
        Schedule(config.steps, config.log_every, config.checkpoint_every),
    )


def initial_state(config: Config, params: PyTree, beliefs: Belief, seed: int) -> TrainState:
    """What training starts from: for every problem the generator without a task.

    Parameters, the optimiser's state and the beliefs, which training leaves as they are, have the
    problems along axis 0.
    """
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(KINDS)), params)
    return TrainState.start(stacked, _optimizer(config), seed, beliefs)


def step_of(config: Config, source: Source) -> Update:
    """The training step."""
    problem = inverse_problem(source.generator)
    settings = [setting(kind, source.data.shape) for kind in KINDS.values()]
    stacked: Setting = jax.tree.map(lambda *leaves: jnp.stack(leaves), *settings)

    def gradient(params: PyTree, given: Given) -> tuple[PyTree, Measured]:
        images = given.batch["image"]

        def one(of: tuple[PyTree, Setting, Belief, Array]) -> tuple[PyTree, Measured]:
            params, at, belief, keys = of
            return jax.grad(task_loss, has_aux=True)(
                params, problem, source, config, belief, at, images, keys
            )

        # One after the other: the program is compiled once for all problems.
        keys = jnp.stack(split_each(given.keys, len(KINDS)))
        found, rows = jax.lax.map(one, (params, stacked, given.memory, keys))
        means = {**_by_problem(rows.means), "loss": jnp.mean(rows.means["loss"])}
        return found, Measured(means, _by_problem(rows.medians))

    def contract(params: PyTree) -> PyTree:
        return jax.lax.map(source.generator.contract, params)

    return training_step(gradient, _optimizer(config), contract=contract)


def _by_problem(rows: Metrics) -> Metrics:
    """One metric for every problem, given all along axis 0."""
    return {
        f"{quantity}_{name}": values[number]
        for quantity, values in rows.items()
        for number, name in enumerate(KINDS)
    }


def task_loss(
    params: PyTree,
    problem: jdeq.InputProblem,
    source: Source,
    config: Config,
    belief: Belief,
    at: Setting,
    images: Array,
    keys: Array,
) -> tuple[Array, Measured]:
    """Mean squared error (summed over pixels) to the clean images, plus the Jacobian penalty.

    Args:
        params: Parameters of the generator.
        problem: The input problem, see `inverse_problem`.
        source: Where the network and its settings come from.
        config: Settings.
        belief: Prior of the latents and its weight.
        at: The problem.
        images: Clean images, [B, H, W, C] in [0, 1].
        keys: PRNG keys of the corruptions and of the penalty's probes, [B].

    Returns:
        (loss, metrics).
    """
    images, keys = augmented(source.config, images, keys)
    corruptions, probes = split_each(keys)
    observed, how = corrupt(at, images, corruptions)
    generator = source.generator
    _, z0 = generator.start(params, len(images))
    u0 = jnp.zeros((len(images), generator.latent_dim))
    data = (how, jnp.broadcast_to(belief.penalty, (len(images),)))
    arguments = (
        problem, Parameters(params, jax.lax.stop_gradient(belief.prior)), observed, u0, z0
    )  # fmt: skip
    size, steps = config.inner_step_size, config.inner_steps
    if config.outer_gradient == "unrolled":
        solution = unrolled_solve(*arguments, data=data, step_size=size, steps=steps)
    else:
        method = jdeq.joint.Descent(step_size=size)
        solution = jdeq.joint_solve(*arguments, data=data, method=method, max_steps=steps)
    z = solution.value.z
    loss = jnp.mean(squared_error(generator.decode(params, z), images))
    residual = solution.residual
    medians = {"kkt_state": residual.state, "kkt_stationarity": residual.stationarity}
    measured = Measured({"loss": loss}, medians)
    if source.config.jacobian_weight:
        x = belief.prior.latents(jax.lax.stop_gradient(solution.value.x))
        jacobian = jdeq.regularization.jacobian_frobenius(
            generator.problem.cell, params, z, x, probes, probes=source.config.jacobian_probes
        )
        loss += source.config.jacobian_weight * jnp.mean(jacobian)
    return loss, measured


def _optimizer(config: Config) -> optax.GradientTransformation:
    """Of each problem by itself."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    one = optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )
    return optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
