"""Training: every step adapts to its tasks' supports and follows the loss on their queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jdeq
from experiments.common.data.tasks import Tasks
from experiments.common.runs import RunDirectory
from experiments.common.step import Given, Measured, TrainState, Update, training_step
from experiments.common.terminal import say
from experiments.common.training import Schedule, fit
from experiments.meta.baselines import Model, build_baseline
from experiments.meta.config import Config
from experiments.meta.problem import Learner, build_learner, losses_of
from experiments.meta.tasks import load_tasks

PyTree = Any


def train(config: Config, run: RunDirectory, data_root: Path | None) -> None:
    """Train the baselines to the last step, then the learner, from the newest checkpoints.

    The learner comes last: a run is trained once it has ended.

    Raises:
        UserError: The data is missing or damaged, or has too few characters or images for the
            tasks of the training or of the evaluation.
    """
    source = load_tasks(config, data_root)
    seed = run.record.seed
    for ways, shots in config.settings:
        source.testing(ways, shots, config.test_queries, seed)
    for kind, steps in config.baselines:
        say(f"training {kind}")
        model, params = build_baseline(kind, config, source.shape, seed)
        optimizer = outer_optimizer(config, steps)
        fit(
            baseline_step(model, config, optimizer),
            TrainState.start(params, optimizer, seed),
            source.training(config, seed),
            run.part(kind),
            Schedule(steps, config.log_every, config.checkpoint_every),
        )
    say("training the learner")
    learner, params = build_learner(config, source.shape, config.ways, seed)
    fit(
        meta_step(learner),
        initial_state(config, params, seed),
        source.training(config, seed),
        run,
        Schedule(config.steps, config.log_every, config.checkpoint_every),
    )


def baseline_step(model: Model, config: Config, optimizer: optax.GradientTransformation) -> Update:
    """The training step of a baseline."""

    def loss(params: PyTree, given: Given) -> tuple[Array, Measured]:
        tasks = given.batch
        target, wanted = tasks.support_label, tasks.query_label
        if not model.regression:
            target, wanted = (jax.nn.one_hot(label, config.ways) for label in (target, wanted))
        outputs = model.outputs(params, tasks.support, target, tasks.query)
        mean = jnp.mean(losses_of(outputs, wanted, model.regression))
        means = {"loss": mean}
        if not model.regression:
            means["accuracy"] = jnp.mean(jnp.argmax(outputs, axis=-1) == tasks.query_label)
        return mean, Measured(means)

    return training_step(jax.grad(loss, has_aux=True), optimizer)


def meta_step(learner: Learner) -> Update:
    """The training step of the learner."""

    def loss(params: PyTree, given: Given) -> tuple[Array, Measured]:
        return outer_loss(params, learner, given.batch, given.keys)

    optimizer = outer_optimizer(learner.config, learner.config.steps)
    return training_step(jax.grad(loss, has_aux=True), optimizer, contract=learner.contract)


def outer_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, its rate falling to zero along a cosine over `steps`."""
    rate = optax.cosine_decay_schedule(config.learning_rate, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )


def initial_state(config: Config, params: PyTree, seed: int) -> TrainState:
    """What training starts from, given the initial parameters."""
    return TrainState.start(params, outer_optimizer(config, config.steps), seed)


def outer_loss(
    params: PyTree, learner: Learner, tasks: Tasks, keys: Array
) -> tuple[Array, Measured]:
    """Mean loss on the queries of adapted tasks, plus the Jacobian penalty at the supports.

    Args:
        params: Parameters.
        learner: The learner.
        tasks: A batch.
        keys: PRNG keys of the penalty's probes, [B].

    Returns:
        (loss, metrics).
    """
    config = learner.config
    target = learner.target(tasks.support_label, config.ways)
    solution = learner.adapt(params, tasks.support, target)
    outputs = learner.predict(params, solution.value, target, tasks.query)
    wanted = learner.target(tasks.query_label, config.ways)
    loss = jnp.mean(learner.losses(outputs, wanted))
    means = {"query_loss": loss}
    if not learner.regression:
        means["accuracy"] = jnp.mean(jnp.argmax(outputs, axis=-1) == tasks.query_label)
    if config.jacobian_weight:
        z, x, _ = jax.lax.stop_gradient(solution.value)
        squares = jdeq.regularization.jacobian_frobenius(
            learner.problem.cell, params, z, x, keys, data=learner.inject(params, tasks.support)
        )
        means["jacobian"] = jnp.mean(squares)
        loss = loss + config.jacobian_weight * means["jacobian"]
    means["loss"] = loss
    means["support_objective"] = jnp.mean(solution.aux.objective)
    means["failed"] = jnp.mean(solution.result >= jdeq.Result.diverged)
    medians = {f"kkt_{block}": each for block, each in solution.residual._asdict().items()}
    return loss, Measured(means, medians)
