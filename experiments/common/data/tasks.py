"""Few-shot tasks, drawn from characters in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from experiments.common.data.order import OrderedBatches
from experiments.common.errors import UserError
from experiments.common.parallel import local_rows

_ENDLESS = 2**31 - 1  # tasks; no training draws as many


class Tasks(NamedTuple):
    """A batch of B tasks of N classes, labelled 0 to N - 1 in each; NumPy's or JAX's arrays.

    Attributes:
        support: What is learnt from, float32 [B, n, H, W, C] in [0, 1].
        support_label: int32 [B, n].
        query: What is tested on, float32 [B, m, H, W, C].
        query_label: int32 [B, m].
    """

    support: Any
    support_label: Any
    query: Any
    query_label: Any


def task_batches(
    draw: Callable[[int], Tasks], size: int, options: grain.ReadOptions | None = None
) -> OrderedBatches:
    """Endless batches of tasks 0, 1, ..., of which each process draws its own rows.

    Raises:
        UserError: The batch cannot be spread evenly over the devices of several processes.
    """
    rows = local_rows(size)
    numbers = grain.MapDataset.range(_ENDLESS).batch(size, batch_fn=list)
    tasks = numbers.map(lambda numbers: stack([draw(number) for number in numbers[rows]]))
    return OrderedBatches(tasks.to_iter_dataset(options), size)


def stack(tasks: list[Tasks]) -> Tasks:
    """Tasks as one batch."""
    return Tasks(*(np.stack(parts) for parts in zip(*tasks, strict=True)))


@dataclass(frozen=True, eq=False)
class Characters:
    """Classes of images.

    Attributes:
        names: One a class.
        images: One array a class, [n, H, W, C], or [n, D] of flattened images: uint8, 1 for ink and
            0 for paper, or float32 in [0, 1].
    """

    names: tuple[str, ...]
    images: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels) of every image."""
        return self.images[0].shape[1:]

    def flattened(self) -> Characters:
        """The same with each image as one row of numbers."""
        return Characters(self.names, tuple(part.reshape(len(part), -1) for part in self.images))

    def rotated(self) -> Characters:
        """Each class four times: as it is, and turned by 90, 180 and 270 degrees."""
        turns = range(4)
        return Characters(
            tuple(f"{name}, turned by {90 * k}" for name in self.names for k in turns),
            tuple(np.rot90(images, k, (1, 2)) for images in self.images for k in turns),
        )


@dataclass(frozen=True, eq=False)
class TaskSampler:
    """Draws N-way K-shot tasks; task number i of a seed is always the same.

    Attributes:
        characters: The classes.
        ways: N, classes a task.
        shots: K, support images a class.
        queries: Query images a class.
        seed: At least 0 and below 2**32.

    Raises:
        UserError: There are fewer classes than N, or a class has fewer images than a task needs.
    """

    characters: Characters
    ways: int
    shots: int
    queries: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.ways, self.shots, self.queries) < 1:
            raise UserError(
                f"tasks of {self.ways} ways, {self.shots} shots and {self.queries} queries cannot "
                "be drawn; give at least 1 of each."
            )
        if self.ways > len(self.characters):
            raise UserError(
                f"{self.ways}-way tasks need {self.ways} characters and there are "
                f"{len(self.characters)}; lower N or give more characters."
            )
        for name, images in zip(self.characters.names, self.characters.images, strict=True):
            if len(images) < self.shots + self.queries:
                raise UserError(
                    f"character {name} has {len(images)} images, and tasks of {self.shots} shots "
                    f"and {self.queries} queries need {self.shots + self.queries} of each; ask for "
                    "fewer, or remove the character."
                )

    def draw(self, number: int) -> Tasks:
        """Task `number`, without the batch axis; images are in the order of their labels."""
        random = np.random.default_rng((self.seed, number))
        classes = random.choice(len(self.characters), self.ways, replace=False)
        support, query = [], []
        for index in classes:
            images = self.characters.images[index]
            drawn = images[random.permutation(len(images))[: self.shots + self.queries]]
            support.append(drawn[: self.shots])
            query.append(drawn[self.shots :])
        labels = np.arange(self.ways, dtype=np.int32)
        return Tasks(
            np.concatenate(support).astype(np.float32),
            np.repeat(labels, self.shots),
            np.concatenate(query).astype(np.float32),
            np.repeat(labels, self.queries),
        )

    def batches(self, size: int) -> OrderedBatches:
        """Endless batches of `Tasks`, in order."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return task_batches(self.draw, size, options)

    def first(self, count: int, start: int = 0) -> Tasks:
        """Tasks `start` to `start + count`, as one batch."""
        return stack([self.draw(start + number) for number in range(count)])
