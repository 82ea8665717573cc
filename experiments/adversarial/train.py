"""Training of three classifiers: on clean images, on PGD's and on joint attacks.

All start from the same parameters and see the same images in the same order; they differ in the
images' perturbations alone. Each has its own part of the run directory; the joint-trained one, the
last, is the run's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jdeq
from experiments.adversarial.attacks import PGD, Joint, published_pgd
from experiments.adversarial.config import Config
from experiments.adversarial.problem import Ball, Network, build_network, cross_entropy
from experiments.common.data import batches, load_images
from experiments.common.runs import RunDirectory
from experiments.common.step import Given, Measured, TrainState, Update, training_step
from experiments.common.terminal import say
from experiments.common.training import Schedule, fit
from jdeq.joint import InnerSolve

PyTree = Any

MODELS = ("clean", "pgd", "joint")
"""In the order in which they are trained."""

_ROUGH = 1e-2


class Solved(NamedTuple):
    """What the loss of a training step is taken at.

    Attributes:
        loss: Cross-entropy, [B].
        z: Equilibria.
        u: Perturbations in units of the radius.
        residual: Of the state, relative to `||z||`, [B].
        failed: Whether the solve failed, bool [B].
    """

    loss: Array
    z: PyTree
    u: Array
    residual: Array
    failed: Array


def train(config: Config, run: RunDirectory, data_root: Path | None) -> None:
    """Train all three to the last step, each from its newest checkpoint if there is one."""
    data = load_images(config.dataset, data_root)
    seed = run.record.seed
    network, params = build_network(config.sizes(data.shape), seed)
    for model in MODELS:
        say(f"training {model}")
        fit(
            step_of(config, network, model),
            initial_state(config, params, seed),
            batches(data.train, config.batch_size, seed),
            part_of(run, model),
            Schedule(config.steps, config.log_every, config.checkpoint_every),
        )


def part_of(run: RunDirectory, model: str) -> RunDirectory:
    """Where a model's checkpoints and metrics are."""
    return run if model == MODELS[-1] else run.part(model)


def outer_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW on the parameters with clipped gradients, its rate falling to zero along a cosine."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )


def initial_state(config: Config, params: PyTree, seed: int) -> TrainState:
    """What training starts from, given the initial parameters; their buffers may be given up."""
    return TrainState.start(jax.tree.map(jnp.copy, params), outer_optimizer(config), seed)


def step_of(config: Config, network: Network, model: str) -> Update:
    """The training step of a model."""

    def loss(params: PyTree, given: Given) -> tuple[Array, Measured]:
        # Attacks at the full radius from the first step on keep some models from learning at all.
        share = jnp.minimum(1.0, (given.step + 1) / max(1, config.ramp * config.steps))
        radius = config.radius * share
        return training_loss(params, config, network, model, given.batch, radius, given.keys)

    return training_step(
        jax.grad(loss, has_aux=True), outer_optimizer(config), contract=network.contract
    )


def training_loss(
    params: PyTree,
    config: Config,
    network: Network,
    model: str,
    batch: dict[str, Array],
    radius: Array,
    keys: Array,
) -> tuple[Array, Measured]:
    """Mean cross-entropy under the model's attack, plus the Jacobian penalty.

    Args:
        params: Parameters of the classifier.
        config: Settings.
        network: Its network.
        model: One of `MODELS`.
        batch: Images [B, H, W, C] in [0, 1] and labels.
        radius: Of the attack, a scalar.
        keys: PRNG keys of the penalty's probes, [B].

    Returns:
        (loss, metrics).
    """
    images, labels = batch["image"], batch["label"]
    ball = Ball(images, jnp.full(len(images), radius, images.dtype))
    solve = {"clean": _solve_clean, "pgd": _solve_pgd, "joint": _solve_joint}[model]
    found = solve(params, config, network, labels, ball)
    loss = jnp.mean(found.loss)
    means = {"cross_entropy": loss, "failed": jnp.mean(found.failed)}
    if config.jacobian_weight:
        at = jax.lax.stop_gradient((found.z, found.u))
        jacobian = jnp.mean(
            jdeq.regularization.jacobian_frobenius(
                network.problems[config.norm].cell, params, *at, keys,
                data=ball, probes=config.jacobian_probes,
            )
        )  # fmt: skip
        means["jacobian"] = jacobian
        loss = loss + config.jacobian_weight * jacobian
    return loss, Measured({"loss": loss, **means}, {"state_residual": found.residual})


def joint_attack(config: Config) -> Joint:
    """The joint attack of training."""
    return Joint(config.norm, config.joint_steps, config.joint_rate)


def pgd_attack(config: Config) -> PGD:
    """The nested attack of training."""
    if config.pgd == "published":
        return published_pgd(config.norm)
    inner = InnerSolve(rtol=_ROUGH, warm_start=True)
    return PGD(config.norm, config.pgd_steps, 2.5 / config.pgd_steps, inner=inner)


def _solve_clean(
    params: PyTree, config: Config, network: Network, labels: Array, ball: Ball
) -> Solved:
    solution = network.solve(params, ball.image, _ROUGH / 10, config.solve_steps)
    loss = cross_entropy(network.head(params, solution.value), labels)
    return _solved(loss, solution.value, jnp.zeros_like(ball.image), solution.residual, solution)


def _solve_joint(
    params: PyTree, config: Config, network: Network, labels: Array, ball: Ball
) -> Solved:
    """The loss is the value of the inner problem: no backward solve, by the envelope theorem."""
    attack = joint_attack(config)
    values, solution = jdeq.input_value(
        network.problems[config.norm], params, labels, jnp.zeros_like(ball.image),
        _start(network, params, labels), data=ball, method=attack.method, max_steps=attack.steps,
    )  # fmt: skip
    z, u, _ = solution.value
    return _solved(-values, z, u, solution.residual.state, solution)


def _solve_pgd(
    params: PyTree, config: Config, network: Network, labels: Array, ball: Ball
) -> Solved:
    attack = pgd_attack(config)
    solution = attack.solve(network, params, labels, ball, jnp.zeros_like(ball.image))
    z, u, _ = solution.value
    loss = cross_entropy(network.head(params, z), labels)
    return _solved(loss, z, u, solution.residual.state, solution)


def _start(network: Network, params: PyTree, labels: Array) -> PyTree:
    return jax.lax.stop_gradient(network.start(params, len(labels)))


def _solved(loss: Array, z: PyTree, u: Array, residual: Array, solution: jdeq.Solution) -> Solved:
    squares = [jnp.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(z)]
    relative = residual / jnp.sqrt(sum(squares[1:], start=squares[0]))
    return Solved(loss, z, u, relative, solution.result >= jdeq.Result.diverged)
