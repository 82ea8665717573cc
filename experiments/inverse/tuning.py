"""Penalties, rates and lengths, chosen on test images that are not reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common.errors import UserError
from experiments.common.metrics import psnr
from experiments.inverse.config import Config
from experiments.inverse.measurements import KINDS, check_images, corrupt, setting
from experiments.inverse.prior import Prior
from experiments.inverse.problem import Parameters
from experiments.inverse.solvers import Batch, Method, Solver
from experiments.inverse.source import Source

PyTree = Any

_TEST_SHARE = 0.75
_SEED = 0  # of the corruptions, the same for every run, so that seeds compare
_ENOUGH = 0.05  # dB that a shorter solve may be behind the best


class Images(NamedTuple):
    """Clean images that never trained a model.

    Attributes:
        test: Reported, [N, H, W, C].
        validation: What is tuned on, [M, H, W, C].
    """

    test: np.ndarray
    validation: np.ndarray


class Belief(NamedTuple):
    """What is believed of the latents of one problem.

    Attributes:
        prior: Their distribution.
        penalty: Its weight beside the squared error, [].
    """

    prior: Prior
    penalty: Array


class Choice(NamedTuple):
    """A method as tuned for one problem."""

    method: Method
    rate: float
    psnr: float


def split_images(source: Source, config: Config) -> Images:
    """The first test images to report, and the following to tune on.

    Raises:
        UserError: There are fewer than two test images, or they are not in [0, 1].
    """
    available = len(source.data.test)
    if available < 2:
        raise UserError(f"{source.data.name} has {available} test images; at least 2 are needed.")
    count = min(config.test_images, max(1, int(_TEST_SHARE * available)))
    images = source.data.test.first(count + config.validation_images)
    check_images(images)
    return Images(images[:count], images[count:])


def batch_of(name: str, images: np.ndarray) -> Batch:
    """A problem's observations of images, the same whenever it is asked for."""
    kind = KINDS[name]
    key = jax.random.fold_in(jax.random.key(_SEED), list(KINDS).index(name))
    clean = jnp.asarray(images)
    keys = jax.random.split(key, len(clean))
    observed, how = corrupt(setting(kind, images.shape[1:]), clean, keys)
    return Batch(images, observed, how)


def choose_beliefs(
    source: Source, params: PyTree, priors: Sequence[Prior], config: Config, solver: Solver
) -> dict[str, Belief]:
    """The prior of each problem, and its weight, by which a generator without a task restores best.

    The candidates for the weight are multiples of the variance of noise and model error together,
    the latter measured by reconstructing the validation images themselves.

    Args:
        source: The images.
        params: Parameters of the generator.
        priors: To choose from, of the same shapes.
        config: Settings.
        solver: Runs the solves.
    """
    images = split_images(source, config).validation
    method = Method("joint", max(config.joint_steps))
    rate = float(np.median(config.rates))

    def error(batch: Batch, prior: Prior, penalty: float) -> float:
        made = solver.restore(method, rate, Parameters(params, prior), penalty, batch).images
        return float(batch.squared_errors(made).mean())

    model = _model_error(solver, method, rate, Parameters(params, priors[0]), images)
    chosen = {}
    for name, kind in KINDS.items():
        batch = batch_of(name, images)
        weights = [share * (kind.noise**2 + model) for share in config.penalties]
        tried = {
            (number, weight): error(batch, prior, weight)
            for number, prior in enumerate(priors)
            for weight in weights
        }
        number, weight = min(tried, key=lambda pair: tried[pair])
        chosen[name] = Belief(priors[number], jnp.float32(weight))
    return chosen


def choose_rates(
    solver: Solver,
    params: Parameters,
    penalty: float | Array,
    batch: Batch,
    methods: Sequence[Method],
    rates: Sequence[float],
) -> dict[Method, Choice]:
    """Each method at the rate by which it restores the validation images best."""
    chosen = {}
    for method in methods:
        tried = [
            Choice(method, rate, quality(solver, method, rate, params, penalty, batch))
            for rate in rates
        ]
        chosen[method] = max(tried, key=lambda choice: choice.psnr)
    return chosen


def shortest(choices: Mapping[Method, Choice]) -> Choice:
    """The shortest that is within 0.05 dB of the best."""
    best = max(choice.psnr for choice in choices.values())
    enough = [choice for choice in choices.values() if choice.psnr >= best - _ENOUGH]
    return min(enough, key=lambda choice: choice.method.steps)


def quality(
    solver: Solver,
    method: Method,
    rate: float,
    params: Parameters,
    penalty: float | Array,
    batch: Batch,
) -> float:
    """PSNR of what the method restores, in dB."""
    made = solver.restore(method, rate, params, penalty, batch).images
    return psnr(float(batch.squared_errors(made).mean()))


def _model_error(
    solver: Solver, method: Method, rate: float, params: Parameters, images: np.ndarray
) -> float:
    """Mean squared error of reconstructions of clean images, all of whose pixels are seen."""
    clean = jnp.asarray(images)
    plain = KINDS["denoise02"]._replace(noise=0.0)
    keys = jax.random.split(jax.random.key(_SEED), len(clean))
    observed, how = corrupt(setting(plain, images.shape[1:]), clean, keys)
    batch = Batch(images, observed, how)
    made = solver.restore(method, rate, params, 0.0, batch).images
    return float(batch.squared_errors(made).mean())
