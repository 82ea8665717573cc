"""Accuracy, or squared error, over test tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common.data.tasks import Tasks
from experiments.meta.problem import Learner, losses_of
from experiments.meta.tasks import Sampler

PyTree = Any
Outputs = Callable[[PyTree, Array, Array, Array], Array]

_EXAMPLES = 4000  # of all tasks that are looked at together
_NORMAL = 1.96  # standard errors on either side of a mean that hold 95 % of a normal distribution


def learner_outputs(learner: Learner) -> Outputs:
    """Outputs for the queries after a solve as in training."""

    def outputs(params: PyTree, support: Array, target: Array, query: Array) -> Array:
        solution = learner.adapt(params, support, target)
        return learner.predict(params, solution.value, target, query)

    return outputs


def scores(
    outputs: Outputs, params: PyTree, sampler: Sampler, ways: int, count: int, regression: bool
) -> np.ndarray:
    """The share of right answers, or the mean squared error, of each test task.

    Args:
        outputs: Of queries [B, m, N], for parameters, support, target and query.
        params: Parameters.
        sampler: Draws the test tasks.
        ways: Classes a task.
        count: Test tasks.
        regression: Whether targets are numbers.

    Returns:
        [count].
    """

    @jax.jit
    def score(params: PyTree, tasks: Tasks) -> Array:
        if regression:
            made = outputs(params, tasks.support, tasks.support_label, tasks.query)
            return jnp.mean(losses_of(made, tasks.query_label, True), axis=-1)
        target = jax.nn.one_hot(tasks.support_label, ways)
        made = outputs(params, tasks.support, target, tasks.query)
        return jnp.mean(jnp.argmax(made, axis=-1) == tasks.query_label, axis=-1)

    found = [np.asarray(score(params, tasks)) for tasks in _batches(sampler, count)]
    return np.concatenate(found)[:count]


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval) over tasks."""
    spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(values.mean()), float(_NORMAL * spread)


def _batches(sampler: Sampler, count: int) -> Iterator[Tasks]:
    """At least `count` tasks in batches of one size."""
    first = sampler.draw(0)
    size = max(1, min(count, _EXAMPLES // (len(first.support) + len(first.query))))
    for start in range(0, count, size):
        yield sampler.first(size, start)
