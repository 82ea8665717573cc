"""A small convolutional classifier of the same data, whose features compare distributions.

The Fréchet distance on these features is no FID, which is defined on those of an Inception
network trained on ImageNet; numbers compare within one data set and one seed only.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.common.data import ImageData, Split, batches
from experiments.common.runs import RunDirectory
from experiments.common.step import Given, Measured, TrainState, Update, training_step
from experiments.common.training import Schedule, fit
from experiments.generative.config import Config
from experiments.generative.problem import restore_part
from jdeq.nn import Conv

PyTree = Any

PART = "classifier"
_CHANNELS = (16, 32)
_FEATURES = 64
_BATCH = 64
_RATE = 2e-3
_WEIGHT_DECAY = 0.1
_CHUNK = 500


class Classifier(nnx.Module):
    """Two 3x3 convolutions of stride 2, a layer of 64 features, and a linear one.

    Args:
        image_shape: (height, width, channels).
        classes: Number of classes.
        rngs: Source of the parameters' keys.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int, *, rngs: nnx.Rngs):
        height, width, depth = image_shape
        narrow, wide = _CHANNELS
        self.first = Conv(depth, narrow, 3, use_bias=True, stride=2, rngs=rngs)
        self.second = Conv(narrow, wide, 3, use_bias=True, stride=2, rngs=rngs)
        size = math.ceil(height / 4) * math.ceil(width / 4) * wide
        self.hidden = nnx.Linear(size, _FEATURES, rngs=rngs)
        self.logits = nnx.Linear(_FEATURES, classes, rngs=rngs)

    def features(self, images: Array) -> Array:
        """What stands before the last layer: [B, 64] for images [B, H, W, C] in [0, 1]."""
        y = jax.nn.silu(self.second(jax.nn.silu(self.first(images - 0.5))))
        return jax.nn.silu(self.hidden(y.reshape(len(y), -1)))

    def __call__(self, images: Array) -> Array:
        """Logits, [B, classes]."""
        return self.logits(self.features(images))


class FeatureExtractor(NamedTuple):
    """A trained classifier.

    Attributes:
        graph: Its structure.
        params: Its parameters.
        classes: The data set's label of each class, ascending.
    """

    graph: nnx.GraphDef
    params: PyTree
    classes: np.ndarray

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features [N, 64] of images [N, H, W, C] in [0, 1]."""
        return self._map("features", images)

    def accuracy(self, split: Split) -> float | None:
        """Share of correct labels, or None where the split's labels are not those trained on."""
        if split.labels is None or not np.isin(split.labels, self.classes).all():
            return None
        logits = np.concatenate(
            [self._map("__call__", images) for images in split.in_batches(_CHUNK)]
        )
        return float(np.mean(self.classes[logits.argmax(axis=-1)] == split.labels))

    def _map(self, method: str, images: np.ndarray) -> np.ndarray:
        chunks = (images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK))
        return np.concatenate(
            [np.asarray(_apply(self.graph, method, self.params, chunk)) for chunk in chunks]
        )


@partial(jax.jit, static_argnums=(0, 1))
def _apply(graph: nnx.GraphDef, method: str, params: PyTree, images: Array) -> Array:
    return getattr(nnx.merge(graph, params), method)(images)


def train_classifier(config: Config, run: RunDirectory, data: ImageData) -> None:
    """Train to the last step, from the newest checkpoint if there is one.

    Raises:
        ValueError: The data set has no labels.
    """
    seed = run.record.seed
    graph, params, classes = _build(data, seed)
    fit(
        step_of(config, graph, classes),
        TrainState.start(params, _optimizer(config), seed),
        batches(data.train, min(_BATCH, len(data.train)), seed),
        run.part(PART),
        Schedule(config.classifier_steps, config.log_every, config.checkpoint_every),
    )


def step_of(config: Config, graph: nnx.GraphDef, classes: np.ndarray) -> Update:
    """The training step; for `classes` see `FeatureExtractor`."""
    labels = jnp.asarray(classes)

    def loss(params: PyTree, given: Given) -> tuple[Array, Measured]:
        logits = nnx.merge(graph, params)(given.batch["image"])
        wanted = jnp.searchsorted(labels, given.batch["label"])
        mean = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, wanted))
        return mean, Measured({"loss": mean})

    return training_step(jax.grad(loss, has_aux=True), _optimizer(config))


def load_classifier(config: Config, run: RunDirectory, data: ImageData) -> FeatureExtractor:
    """The classifier of a run.

    Raises:
        UserError: It has no checkpoint yet, or the images are not of the size trained on.
        ValueError: The data set has no labels.
    """
    graph, params, classes = _build(data, run.record.seed)
    template = jax.eval_shape(lambda: TrainState.start(params, _optimizer(config), run.record.seed))
    restored = restore_part(run, PART, template)
    return FeatureExtractor(graph, restored.state.params, classes)


def _build(data: ImageData, seed: int) -> tuple[nnx.GraphDef, PyTree, np.ndarray]:
    if data.train.labels is None:
        raise ValueError(f"{data.name} has no labels that a classifier could be trained on.")
    classes = np.unique(data.train.labels)
    graph, params = nnx.split(Classifier(data.shape, len(classes), rngs=nnx.Rngs(seed)))
    return graph, params, classes


def _optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(_RATE, config.classifier_steps)
    return optax.adamw(rate, weight_decay=_WEIGHT_DECAY)
