"""A small training of every task: its step, what it starts from, and its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.adversarial import train as adversarial
from experiments.adversarial.config import PRESETS as ADVERSARIAL
from experiments.adversarial.problem import build_network
from experiments.common.data import ArrayImages, ImageData, Split, batches
from experiments.common.data.tasks import TaskSampler
from experiments.common.step import TrainState, Update
from experiments.generative import classifier, nested_training, vae
from experiments.generative import train as generative
from experiments.generative.config import PRESETS as GENERATIVE
from experiments.generative.problem import build_generator
from experiments.meta import train as meta
from experiments.meta.baselines import build_baseline
from experiments.meta.problem import build_learner
from tests.experiments.meta.learners import CLASSES, SINUSOID, classes

BATCH, HIDDEN = 16, 40
_SHAPE = (8, 8, 1)
_GENERATIVE = replace(
    GENERATIVE["smoke"], hidden=HIDDEN, decoder_hidden=32, latent_dim=4, batch_size=BATCH,
    inner_steps=8, warm_starts=24, nested_inner_steps=3, jacobian_weight=1.0,
)  # fmt: skip
_ADVERSARIAL = replace(ADVERSARIAL["smoke"], batch_size=BATCH, jacobian_weight=0.1)


class Training(NamedTuple):
    """What `fit` trains with."""

    update: Update
    state: TrainState
    batches: Any


def data() -> ImageData:
    random = np.random.default_rng(0)
    pixels = random.random((48, *_SHAPE), np.float32)
    split = Split(ArrayImages(pixels), random.integers(0, 10, 48).astype(np.int32))
    return ImageData("random", split, split)


def _images() -> Any:
    return batches(data().train, BATCH, seed=0)


def _generative() -> Training:
    generator, params = build_generator(_GENERATIVE, _SHAPE, seed=0)
    state = generative.initial_state(_GENERATIVE, params, seed=0)
    return Training(generative.step_of(_GENERATIVE, generator), state, _images())


def _controlled() -> Training:
    # Some errors are allowed that the first steps' solves have, and then no more.
    config = replace(_GENERATIVE, error_allowed=(0.9, 0.01), least_inner_steps=4, steps=4)
    generator, params = build_generator(config, _SHAPE, seed=0)
    state = generative.initial_state(config, params, seed=0)
    return Training(generative.step_of(config, generator), state, _images())


def _multiscale() -> Training:
    config = replace(_GENERATIVE, generator="multiscale", channels=(8, 16))
    generator, params = build_generator(config, _SHAPE, seed=0)
    state = generative.initial_state(config, params, seed=0)
    return Training(generative.step_of(config, generator), state, _images())


def _nested() -> Training:
    generator, params = build_generator(_GENERATIVE, _SHAPE, seed=0)
    state = nested_training.initial_state(_GENERATIVE, params, seed=0)
    return Training(nested_training.step_of(_GENERATIVE, generator), state, _images())


def _vae() -> Training:
    model, params = vae.build_vae(_GENERATIVE, _SHAPE, seed=0)
    state = vae.initial_state(_GENERATIVE, params, seed=0)
    return Training(vae.step_of(_GENERATIVE, model), state, _images())


def _classifier() -> Training:
    labels = np.arange(10)
    graph, params = nnx.split(classifier.Classifier(_SHAPE, 10, rngs=nnx.Rngs(0)))
    state = TrainState.start(params, classifier._optimizer(_GENERATIVE), 0)
    return Training(classifier.step_of(_GENERATIVE, graph, labels), state, _images())


def _attacked(model: str) -> Training:
    network, params = build_network(_ADVERSARIAL.sizes(_SHAPE), 0)
    state = adversarial.initial_state(_ADVERSARIAL, params, 0)
    return Training(adversarial.step_of(_ADVERSARIAL, network, model), state, _images())


def _inverse() -> Training:
    # They take longer to import than all the rest, which other processes need not wait for.
    from experiments.inverse import train as inverse
    from experiments.inverse.config import PRESETS
    from experiments.inverse.measurements import KINDS
    from experiments.inverse.prior import Prior
    from experiments.inverse.source import Source
    from experiments.inverse.tuning import Belief

    config = replace(PRESETS["smoke"], batch_size=BATCH, inner_steps=8)
    generator, params = build_generator(_GENERATIVE, _SHAPE, seed=0)
    source = Source(data(), generator, _GENERATIVE, params, None)
    belief = Belief(Prior.standard(_GENERATIVE.latent_dim), jnp.asarray(0.1))
    beliefs = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(KINDS)), belief)
    state = inverse.initial_state(config, params, beliefs, seed=0)
    return Training(inverse.step_of(config, source), state, _images())


def _few_shot(config: Any) -> Training:
    config = replace(config, inner_steps=8, jacobian_weight=0.1)
    if config.dataset == "sinusoid":
        order = meta.load_tasks(config, None).training(config, 0)
    else:
        order = _characters(config).batches(BATCH)
    learner, params = build_learner(config, _example(config), config.ways, 0)
    return Training(meta.meta_step(learner), meta.initial_state(config, params, 0), order)


def _baseline(kind: Any) -> Training:
    model, params = build_baseline(kind, CLASSES, _example(CLASSES), 0)
    optimizer = meta.outer_optimizer(CLASSES, 100)
    state = TrainState.start(params, optimizer, 0)
    order = _characters(CLASSES).batches(BATCH)
    return Training(meta.baseline_step(model, CLASSES, optimizer), state, order)


def _characters(config: Any) -> TaskSampler:
    return TaskSampler(classes(), config.ways, config.shots, config.queries, seed=0)


def _example(config: Any) -> tuple[int, ...]:
    return (1,) if config.dataset == "sinusoid" else classes().shape


TASKS: dict[str, Callable[[], Training]] = {
    "generative": _generative,
    "generative-controlled": _controlled,
    "generative-multiscale": _multiscale,
    "generative-nested": _nested,
    "generative-vae": _vae,
    "generative-classifier": _classifier,
    "inverse": _inverse,
    "adversarial-clean": lambda: _attacked("clean"),
    "adversarial-pgd": lambda: _attacked("pgd"),
    "adversarial-joint": lambda: _attacked("joint"),
    "meta-classes": lambda: _few_shot(CLASSES),
    "meta-sinusoid": lambda: _few_shot(replace(SINUSOID, tasks=BATCH)),
    "meta-proto": lambda: _baseline("proto"),
    "meta-maml": lambda: _baseline("maml"),
    "meta-imaml": lambda: _baseline("imaml"),
}
