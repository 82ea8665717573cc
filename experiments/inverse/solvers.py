"""The two ways to the latents, joint and nested, at several lengths and rates, and their time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jdeq
from experiments.common.optimisers import cosine_adam
from experiments.common.scaling import scale_problem, scale_start
from experiments.generative.problem import Generator
from experiments.inverse.measurements import Measurement
from experiments.inverse.problem import Parameters, inverse_problem

PyTree = Any

_REPEATS = 3


class Batch(NamedTuple):
    """Problems to be solved together.

    Attributes:
        clean: The images asked for, [B, H, W, C] in [0, 1].
        observed: What is seen of them.
        how: How it is seen.
    """

    clean: np.ndarray
    observed: Array
    how: Measurement

    def squared_errors(self, images: np.ndarray) -> np.ndarray:
        """Mean squared error of each image, [B]: of the hidden pixels where there are any."""
        hidden = 1 - np.asarray(self.how.mask)
        weight = hidden if hidden.any() else np.ones_like(hidden)
        error = weight * (images.astype(np.float64) - self.clean) ** 2
        pixels = np.broadcast_to(weight, error.shape).sum(axis=(1, 2, 3))
        return error.sum(axis=(1, 2, 3)) / pixels


@dataclass(frozen=True)
class Method:
    """A solve of a fixed number of steps.

    Attributes:
        kind: `joint` or `nested`.
        steps: Iterations of the joint solve, or steps on the latent of the nested one.
    """

    kind: str
    steps: int


class Restored(NamedTuple):
    """What a method made of a batch.

    Attributes:
        images: [B, H, W, C] in [0, 1], at the equilibria of the latents.
        seconds: Time of the solve of the whole batch, compiled; NaN if it was not measured.
    """

    images: np.ndarray
    seconds: float


class Solver:
    """Restores batches by the generator of one network.

    Args:
        generator: The network; parameters come with every call, so that one compiled program
            serves all that were trained.
    """

    def __init__(self, generator: Generator):
        self._generator = generator
        self._problem = scale_problem(inverse_problem(generator))

    def restore(
        self,
        method: Method,
        rate: float,
        params: Parameters,
        penalty: float | Array,
        batch: Batch,
        timed: bool = False,
    ) -> Restored:
        """Solve a batch of problems.

        Args:
            method: Which solve.
            rate: First step of Adam on the standardised latent.
            params: Generator and prior.
            penalty: Weight of the prior.
            batch: The problems.
            timed: Whether to measure the time, by the median of three solves.
        """
        count = len(batch.clean)
        u0 = jnp.zeros((count, self._generator.latent_dim))
        scaled, data = scale_start(u0, (batch.how, jnp.full((count,), penalty)), rate)
        solve = partial(
            _solve(self._generator, self._problem, method), params, batch.observed, scaled, data
        )
        u = jax.block_until_ready(solve())  # compiles, too
        seconds = _seconds(solve) if timed else float("nan")
        x = params.prior.latents(rate * u)
        return Restored(np.asarray(self._generator.images(params.generator, x)), seconds)


@cache
def _solve(
    generator: Generator, problem: jdeq.InputProblem, method: Method
) -> Callable[..., Array]:
    """The compiled solve; it stops at no tolerance, so that its time is that of its length."""

    @jax.jit
    def solve(params: Parameters, observed: Array, u0: Array, data: PyTree) -> Array:
        _, z0 = generator.start(params.generator, len(u0))
        arguments = (problem, params, observed, u0, z0)
        options: dict[str, Any] = {
            "data": data, "max_steps": method.steps, "rtol": 0.0, "atol": 0.0,
        }  # fmt: skip
        if method.kind == "joint":
            descent = jdeq.joint.Descent(step_size=1.0)
            return jdeq.joint_solve(*arguments, method=descent, **options).value.x
        optimizer = cosine_adam(1.0, method.steps)
        return jdeq.nested_solve(*arguments, optimizer=optimizer, **options).value.x

    return solve


def _seconds(solve: Callable[[], Any]) -> float:
    spent = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(solve())
        spent.append(time.perf_counter() - started)
    return float(np.median(spent))
