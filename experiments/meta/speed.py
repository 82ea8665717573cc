"""Time of the joint solve against the nested one, and of whole training steps with either."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdeq
from experiments.common.data.tasks import Tasks
from experiments.common.optimisers import cosine_adam
from experiments.common.speed import (
    Comparison,
    Problems,
    compare,
    joint_candidate,
    nested_candidate,
    published_candidate,
)
from experiments.meta.config import Config
from experiments.meta.problem import Learner
from experiments.meta.train import outer_loss

PyTree = Any
Rates = tuple[float, ...]

_PUBLISHED_STEPS = 20
_PUBLISHED_RATE = 0.1
_MOMENTUM = 0.5
_REPEATS = 5


def measure_solves(learner: Learner, params: PyTree, tasks: Tasks, ways: int) -> Comparison:
    """Joint, tuned nested and published nested solves of the support problems of test tasks.

    The tuned nested method has the inner solver of the queries, Picard's steps on a contraction:
    there they are as many as Anderson's, and cheaper.

    Args:
        learner: The learner.
        params: Its parameters.
        tasks: The second half tunes the methods, the first is timed.
        ways: Classes a task.
    """

    def problems(chosen: slice) -> Problems:
        support = jnp.asarray(tasks.support[chosen])
        target = learner.target(jnp.asarray(tasks.support_label[chosen]), ways)
        x0, z0 = learner.start(params, support.shape[0], support.shape[1], target.shape[-1])
        return Problems(params, target, x0, z0, learner.inject(params, support))

    half, grid = len(tasks.support) // 2, _grid(learner.config)
    inner = jdeq.joint.InnerSolve(solver=learner.solver)
    return compare(
        learner.problem,
        validation=problems(slice(half, None)),
        test=problems(slice(half)),
        joint=[
            joint_candidate(name, _descent(learner.config, optimizer), steps, rates)
            for name, optimizer, steps, rates in grid
        ],
        nested=[nested_candidate(*entry, inner=inner) for entry in grid],
        published=published_candidate(optax.adam(_PUBLISHED_RATE), _PUBLISHED_STEPS),
    )


def _descent(config: Config, optimizer: optax.GradientTransformation) -> jdeq.joint.Descent:
    relaxation = config.speed_relaxation
    return jdeq.joint.Descent(optimizer, state_relaxation=relaxation, adjoint_relaxation=relaxation)


def _grid(config: Config) -> list[tuple[str, optax.GradientTransformation, int, Rates]]:
    """Names, optimisers, steps and rates: both methods choose from the same."""
    decayed = [
        (f"Adam, cosine over {steps}", cosine_adam(1.0, steps), steps, config.speed_rates)
        for steps in config.speed_steps
    ]
    rates = config.speed_momentum_rates
    if not rates:
        return decayed
    momentum = optax.sgd(1.0, momentum=_MOMENTUM)
    return [*decayed, ("gradient descent with momentum", momentum, max(config.speed_steps), rates)]


def seconds_of_steps(learner: Learner, params: PyTree, tasks: Tasks) -> dict[str, float]:
    """Median seconds of the outer gradient of a training batch, inner solve joint and nested.

    The nested solve is that of the settings. The two take turns.

    Returns:
        "joint" and "nested" to seconds.
    """
    compiled = {}
    for inner in ("joint", "nested"):
        other = dataclasses.replace(
            learner, config=dataclasses.replace(learner.config, inner=inner)
        )
        compiled[inner] = _gradient(other).lower(params, tasks).compile()
    spent: dict[str, list[float]] = {inner: [] for inner in compiled}
    for _ in range(_REPEATS):
        for inner, function in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(function(params, tasks))
            spent[inner].append(time.perf_counter() - started)
    return {inner: float(np.median(times)) for inner, times in spent.items()}


def step_memory(learner: Learner, params: PyTree, tasks: Tasks) -> dict[str, list[int]]:
    """Working memory of the outer gradient, in bytes, as XLA plans it, at 10 and 40 iterations.

    Returns:
        "kkt" and "unrolled" to [bytes at 10 iterations, bytes at 40].
    """

    def planned(gradient: Any, steps: int) -> int:
        config = dataclasses.replace(
            learner.config, outer_gradient=gradient, inner="joint", inner_steps=steps
        )
        other = dataclasses.replace(learner, config=config)
        analysis = _gradient(other).lower(params, tasks).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)

    return {kind: [planned(kind, steps) for steps in (10, 40)] for kind in ("kkt", "unrolled")}


def _gradient(learner: Learner) -> Any:
    """The compiled outer gradient of (params, tasks)."""

    def gradient(params: PyTree, tasks: Tasks) -> PyTree:
        keys = jax.random.split(jax.random.key(0), len(tasks.support))
        return jax.grad(outer_loss, has_aux=True)(params, learner, tasks, keys)[0]

    return jax.jit(gradient)
