"""Regression on sinusoids, the usual small problem of few-shot learning (Finn et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.common.data.order import OrderedBatches
from experiments.common.data.tasks import Tasks, stack, task_batches

_AMPLITUDE = (0.1, 5.0)
_PHASE = (0.0, np.pi)
_RANGE = (-5.0, 5.0)


@dataclass(frozen=True)
class SinusoidSampler:
    """Draws tasks `y = a sin(i - p)`, a in [0.1, 5], p in [0, pi], inputs i in [-5, 5].

    Attributes:
        shots: Support examples.
        queries: Query examples.
        seed: At least 0 and below 2**32.
    """

    shots: int
    queries: int
    seed: int

    def draw(self, number: int) -> Tasks:
        """Task `number`, without the batch axis: inputs and labels [n, 1]; inputs in [-1, 1]."""
        random = np.random.default_rng((self.seed, number))
        amplitude, phase = random.uniform(*_AMPLITUDE), random.uniform(*_PHASE)
        inputs = random.uniform(*_RANGE, (self.shots + self.queries, 1)).astype(np.float32)
        outputs = (amplitude * np.sin(inputs - phase)).astype(np.float32)
        inputs = inputs / np.float32(_RANGE[1])
        support, query = slice(self.shots), slice(self.shots, None)
        return Tasks(inputs[support], outputs[support], inputs[query], outputs[query])

    def batches(self, size: int) -> OrderedBatches:
        """Endless batches of `Tasks`, in order."""
        return task_batches(self.draw, size)

    def first(self, count: int, start: int = 0) -> Tasks:
        """Tasks `start` to `start + count`, as one batch."""
        return stack([self.draw(start + number) for number in range(count)])
