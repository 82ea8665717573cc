"""The training step that every task shares: gradient, optimiser, and what a task adds to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.common.parallel import BATCH, mean_over_shards, mesh_for, over_shards

PyTree = Any
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """What a training step changes.

    Attributes:
        params: Parameters.
        optimizer: State of their optimiser.
        key: PRNG key of everything random.
        step: Training steps done, int32.
        memory: What a task keeps besides; None for nothing.
    """

    params: PyTree
    optimizer: optax.OptState
    key: Array
    step: Array
    memory: PyTree = None

    @classmethod
    def start(
        cls,
        params: PyTree,
        optimizer: optax.GradientTransformation,
        seed: int,
        memory: PyTree = None,
    ) -> TrainState:
        """What training starts from, given the initial parameters."""
        first = optimizer.init(params)
        return cls(params, first, jax.random.key(seed), jnp.zeros((), jnp.int32), memory)


class Given(NamedTuple):
    """What the loss of a step depends on besides the parameters.

    Attributes:
        batch: Examples, every leaf [B, ...].
        keys: A PRNG key an example, [B]: what is drawn for it does not depend on where it is.
        step: Training steps done before, int32.
        memory: That of the state.
    """

    batch: PyTree
    keys: Array
    step: Array
    memory: PyTree


class Measured(NamedTuple):
    """What the loss says besides its value.

    Attributes:
        means: Metrics that are means over the examples, among them `loss`; scalars.
        medians: Numbers of each example, [B], whose median is the metric.
        found: What is remembered of each example, every leaf [B, ...]; None for nothing.
    """

    means: Metrics
    medians: Metrics = {}  # noqa: RUF012  (never written to)
    found: PyTree = None


Loss = Callable[[PyTree, Given], tuple[Array, Measured]]
Gradient = Callable[[PyTree, Given], tuple[PyTree, Measured]]
Update = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def training_step(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    *,
    contract: Callable[[PyTree], PyTree] | None = None,
    remember: Callable[[Given, PyTree], PyTree] | None = None,
) -> Update:
    """`update(state, batch) -> (state, metrics)`.

    On several devices each takes the gradient of its part of the batch; the rest is done with their
    mean. The gradient does not depend on the number of devices, but for rounding.

    Args:
        gradient: Of the mean loss over the examples: `jax.grad(loss, has_aux=True)`, or one's own.
        optimizer: Of the parameters.
        contract: The nearest parameters that are allowed.
        remember: `remember(given, found)` is the next memory.

    Returns:
        The step. `gradient_norm` is added to the metrics.
    """

    def update(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        key, own = jax.random.split(state.key)
        batch_size = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(own, batch_size)
        given = Given(batch, keys, state.step, state.memory)
        found, measured = _of_whole(gradient, batch_size)(state.params, given)
        changes, optimizer_state = optimizer.update(found, state.optimizer, state.params)
        params = optax.apply_updates(state.params, changes)
        if contract is not None:
            params = contract(params)
        memory = state.memory
        if remember is not None:
            memory = remember(given, measured.found)
        metrics = measured.means | {name: jnp.median(v) for name, v in measured.medians.items()}
        metrics["gradient_norm"] = optax.tree.norm(found)
        return TrainState(params, optimizer_state, key, state.step + 1, memory), metrics

    return update


def _of_whole(gradient: Gradient, batch_size: int) -> Gradient:
    """The gradient for whole batches, of which each device takes its part."""
    mesh = mesh_for(batch_size)
    if mesh.shape[BATCH] == 1:
        return gradient

    def part(params: PyTree, batch: PyTree, keys: Array, step: Array, memory: PyTree) -> Any:
        found, measured = gradient(params, Given(batch, keys, step, memory))
        found, means = mean_over_shards((found, measured.means))
        return found, means, measured.medians, measured.found

    parts = over_shards(
        part, mesh, spread=(False, True, True, False, False), out=(False, False, True, True)
    )

    def whole(params: PyTree, given: Given) -> tuple[PyTree, Measured]:
        found, *measured = parts(params, *given)
        return found, Measured(*measured)

    return whole


def split_each(keys: Array, count: int = 2) -> tuple[Array, ...]:
    """`count` arrays of keys [B], from one."""
    return tuple(jax.vmap(partial(jax.random.split, num=count), out_axes=1)(keys))
