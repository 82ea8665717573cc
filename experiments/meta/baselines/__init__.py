"""What the learner is compared with, trained on the same tasks in the same order.

Each baseline is a function `outputs(params, support, target, query)` of a batch of tasks, made by
`build_baseline`; it has explicit networks where the learner has an equilibrium.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.meta.baselines.imaml import imaml
from experiments.meta.baselines.maml import maml
from experiments.meta.baselines.networks import Body, Classifier
from experiments.meta.baselines.prototypical import prototypical
from experiments.meta.config import Baseline, Config
from experiments.meta.problem import losses_of

PyTree = Any
Outputs = Callable[[PyTree, Array, Array, Array], Array]


@dataclass(frozen=True, eq=False)
class Model:
    """A baseline without its parameters.

    Attributes:
        outputs: `outputs(params, support, target, query)`, [B, m, N], of support [B, n, ...],
            target [B, n, N] and query [B, m, ...].
        regression: Whether targets are numbers.
    """

    outputs: Outputs
    regression: bool


def build_baseline(
    kind: Baseline, config: Config, shape: tuple[int, ...], seed: int
) -> tuple[Model, PyTree]:
    """A baseline and its initial parameters.

    Args:
        kind: Which.
        config: Settings.
        shape: Of an example: (height, width, channels), or (numbers,).
        seed: Of the initial parameters.
    """
    regression = config.dataset == "sinusoid"
    model = Classifier(Body(shape, rngs=nnx.Rngs(seed)))
    graph, params = nnx.split(model)

    def loss(outputs: Array, target: Array) -> Array:
        # The sum over the classes of the mean over their shots, as steps suit every N.
        return jnp.mean(losses_of(outputs, target, regression)) * target.shape[-1]

    if kind == "proto":
        return Model(lambda *given: prototypical(graph, *given), regression), params
    if kind == "imaml":
        adapted: Any = imaml(graph, loss)
    else:
        adapted = maml(graph, loss, first_order=kind == "fomaml")

    def outputs(params: PyTree, support: Array, target: Array, query: Array) -> Array:
        # One task after the other: convolutions whose kernels differ from task to task are slow.
        return jax.lax.map(lambda task: adapted(params, *task), (support, target, query))

    return Model(outputs, regression), params
