"""Training: every step adapts to its tasks' supports and follows the loss on their queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jdeq
from experiments.common.data.tasks import Tasks
from experiments.common.runs import RunDirectory
from experiments.common.terminal import say
from experiments.common.training import Metrics, Schedule, fit
from experiments.meta.baselines import Model, build_baseline
from experiments.meta.config import Config
from experiments.meta.problem import Learner, build_learner, losses_of
from experiments.meta.tasks import load_tasks

PyTree = Any


class TrainState(NamedTuple):
    """What a training step changes.

    Attributes:
        params: Parameters of the learner.
        optimizer: State of AdamW on them.
        key: PRNG key of the Jacobian penalty's probes.
    """

    params: PyTree
    optimizer: optax.OptState
    key: Array


class BaselineState(NamedTuple):
    """What a training step of a baseline changes.

    Attributes:
        params: Its parameters.
        optimizer: State of AdamW on them.
    """

    params: PyTree
    optimizer: optax.OptState


def train(config: Config, run: RunDirectory, data_root: Path | None) -> None:
    """Train the learner to the last step, then the baselines, from the newest checkpoints.

    Raises:
        UserError: The data is missing or damaged, or has too few characters or images for the
            tasks of the training or of the evaluation.
    """
    source = load_tasks(config, data_root)
    seed = run.record.seed
    for ways, shots in config.settings:
        source.testing(ways, shots, config.test_queries, seed)
    learner, params = build_learner(config, source.shape, config.ways, seed)
    fit(
        meta_step(learner),
        initial_state(config, params, seed),
        source.training(config, seed),
        run,
        Schedule(config.steps, config.log_every, config.checkpoint_every),
    )

    for kind, steps in config.baselines:
        say(f"training {kind}")
        model, params = build_baseline(kind, config, source.shape, seed)
        optimizer = outer_optimizer(config, steps)
        fit(
            baseline_step(model, config, optimizer),
            BaselineState(params, optimizer.init(params)),
            source.training(config, seed),
            run.part(kind),
            Schedule(steps, config.log_every, config.checkpoint_every),
        )


def baseline_step(model: Model, config: Config, optimizer: optax.GradientTransformation) -> Any:
    """`update(state, tasks) -> (state, metrics)` of a baseline."""

    def loss(params: PyTree, tasks: Tasks) -> tuple[Array, Metrics]:
        target, wanted = tasks.support_label, tasks.query_label
        if not model.regression:
            target, wanted = (jax.nn.one_hot(label, config.ways) for label in (target, wanted))
        outputs = model.outputs(params, tasks.support, target, tasks.query)
        mean = jnp.mean(losses_of(outputs, wanted, model.regression))
        metrics = {"loss": mean}
        if not model.regression:
            metrics["accuracy"] = jnp.mean(jnp.argmax(outputs, axis=-1) == tasks.query_label)
        return mean, metrics

    def update(state: BaselineState, tasks: Tasks) -> tuple[BaselineState, Metrics]:
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, tasks)
        updates, memory = optimizer.update(gradient, state.optimizer, state.params)
        return BaselineState(optax.apply_updates(state.params, updates), memory), metrics

    return update


def meta_step(learner: Learner) -> Any:
    """`update(state, tasks) -> (state, metrics)` of the learner."""
    config = learner.config
    optimizer = outer_optimizer(config, config.steps)

    def update(state: TrainState, tasks: Tasks) -> tuple[TrainState, Metrics]:
        key, probes = jax.random.split(state.key)
        gradient, metrics = jax.grad(outer_loss, has_aux=True)(state.params, learner, tasks, probes)
        updates, memory = optimizer.update(gradient, state.optimizer, state.params)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        params = learner.contract(optax.apply_updates(state.params, updates))
        return TrainState(params, memory, key), metrics

    return update


def outer_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, its rate falling to zero along a cosine over `steps`."""
    rate = optax.cosine_decay_schedule(config.learning_rate, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )


def initial_state(config: Config, params: PyTree, seed: int) -> TrainState:
    """What training starts from, given the initial parameters."""
    memory = outer_optimizer(config, config.steps).init(params)
    return TrainState(params, memory, jax.random.key(seed))


def outer_loss(params: PyTree, learner: Learner, tasks: Tasks, key: Array) -> tuple[Array, Metrics]:
    """Mean loss on the queries of adapted tasks, plus the Jacobian penalty at the supports.

    Args:
        params: Parameters.
        learner: The learner.
        tasks: A batch.
        key: PRNG key of the penalty's probes.

    Returns:
        (loss, metrics).
    """
    config = learner.config
    target = learner.target(tasks.support_label, config.ways)
    solution = learner.adapt(params, tasks.support, target)
    outputs = learner.predict(params, solution.value, target, tasks.query)
    wanted = learner.target(tasks.query_label, config.ways)
    loss = jnp.mean(learner.losses(outputs, wanted))
    metrics = {"query_loss": loss}
    if not learner.regression:
        metrics["accuracy"] = jnp.mean(jnp.argmax(outputs, axis=-1) == tasks.query_label)
    if config.jacobian_weight:
        z, x, _ = jax.lax.stop_gradient(solution.value)
        squares = jdeq.regularization.jacobian_frobenius(
            learner.problem.cell, params, z, x, key, data=learner.inject(params, tasks.support)
        )
        metrics["jacobian"] = jnp.mean(squares)
        loss = loss + config.jacobian_weight * metrics["jacobian"]
    metrics["loss"] = loss
    residual = solution.residual
    metrics["support_objective"] = jnp.mean(solution.aux.objective)
    metrics["kkt_state"] = jnp.median(residual.state)
    metrics["kkt_adjoint"] = jnp.median(residual.adjoint)
    metrics["kkt_stationarity"] = jnp.median(residual.stationarity)
    metrics["failed"] = jnp.mean(solution.result >= jdeq.Result.diverged)
    return loss, metrics
