"""The tasks of each data set: what is trained on, what is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.common.data import data_root as located
from experiments.common.data import load_images
from experiments.common.data.location import missing
from experiments.common.data.omniglot import load_omniglot
from experiments.common.data.order import OrderedBatches
from experiments.common.data.tasks import Characters, TaskSampler
from experiments.meta.config import Config
from experiments.meta.distortion import DistortedSampler
from experiments.meta.sinusoid import SinusoidSampler

Sampler = TaskSampler | SinusoidSampler

_TEST_SEED = 2**31  # added to the run's, so that no test task is a training task of some seed
_FIRST_TEST_DIGIT = 5


@dataclass(frozen=True)
class TaskSource:
    """Where tasks are drawn from.

    Attributes:
        shape: Of an example: (height, width, channels), or (numbers,).
        train: Classes of the training tasks; None for sinusoids.
        test: Classes of the test tasks; None for sinusoids.
        root: Where the classes were read.
    """

    shape: tuple[int, ...]
    train: Characters | None = None
    test: Characters | None = None
    root: Path | None = None

    def training(self, config: Config, seed: int) -> OrderedBatches:
        """Endless batches of training tasks, in the order of the seed."""
        if self.train is None:
            return SinusoidSampler(config.shots, config.queries, seed).batches(config.tasks)
        if len(self.train) == 0:
            assert self.root is not None
            raise missing("omniglot", "omniglot/images_background.zip", self.root)
        kind = DistortedSampler if config.distort else TaskSampler
        sampler = kind(self.train, config.ways, config.shots, config.queries, seed)
        return sampler.batches(config.tasks)

    def testing(self, ways: int, shots: int, queries: int, seed: int) -> Sampler:
        """The test tasks of a seed."""
        seed = (seed + _TEST_SEED) % 2**32
        if self.test is None:
            return SinusoidSampler(shots, queries, seed)
        return TaskSampler(self.test, ways, shots, queries, seed)


def load_tasks(config: Config, root: Path | None) -> TaskSource:
    """The tasks of the settings.

    Raises:
        UserError: The data is missing or damaged.
    """
    if config.dataset == "sinusoid":
        return TaskSource((1,))
    place = located(root)
    if config.dataset == "digits":
        train, test = _digits()
    else:
        train, test = load_omniglot(place)
        train = train.rotated()
    if config.network == "dense":
        train, test = train.flattened(), test.flattened()
    shape = (train if len(train) else test).shape
    return TaskSource(shape, train, test, place)


def _digits() -> tuple[Characters, Characters]:
    """Digits 0 to 4 and 5 to 9, each times four rotations: 20 classes each."""
    data = load_images("digits")
    images, labels = [], []
    for split in (data.train, data.test):
        assert split.labels is not None
        images.append(split.first(len(split)))
        labels.append(split.labels)
    pixels, digits = np.concatenate(images), np.concatenate(labels)

    def characters(chosen: range) -> Characters:
        stacks = tuple(pixels[digits == digit] for digit in chosen)
        return Characters(tuple(f"digit {digit}" for digit in chosen), stacks).rotated()

    return characters(range(_FIRST_TEST_DIGIT)), characters(range(_FIRST_TEST_DIGIT, 10))
