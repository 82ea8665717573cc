"""Evaluation of a run, from its directory and the data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import plots
from experiments.common.checkpoints import Restored, restore_newest
from experiments.common.cli import Summary
from experiments.common.data import ImageData, load_images
from experiments.common.devices import device_name
from experiments.common.errors import UserError
from experiments.common.metrics import psnr
from experiments.common.runs import RunDirectory
from experiments.common.speed import Comparison
from experiments.common.terminal import say
from experiments.generative.config import Config
from experiments.generative.inference import infer, solve
from experiments.generative.pca import pca_error
from experiments.generative.problem import Generator, build_generator
from experiments.generative.sampling import sample_latents
from experiments.generative.speed import measure_speed
from experiments.generative.train import initial_state

PyTree = Any

_SHOWN = 12  # images a row
_SAMPLES = 60
_SMALLEST_GAP = 1e-5  # the noise of float32 in the objective


def evaluate(config: Config, run: RunDirectory, data_root: Path | None) -> Summary:
    """Reconstruct the test images, sample, and measure speed.

    Returns:
        The results; figures are written to the run directory.

    Raises:
        UserError: There is no checkpoint yet, or the images are not of the size trained on.
    """
    data = load_images(config.dataset, data_root, config.image_size)
    generator, restored = load_generator(config, run, data.shape)
    params, step = restored.state.params, restored.step
    if step < config.steps:
        say(f"the run is unfinished: evaluating step {step} of {config.steps}.")

    size = config.evaluation_batch
    say(f"reconstructing {len(data.test)} test images")
    test = infer(generator, params, data.test.in_batches(min(size, len(data.test))), config)
    pixels = int(np.prod(data.shape))
    say("fitting principal components, sampling new images")
    latents = _training_latents(generator, params, data, config)
    samples = sample_latents(latents, config.mixture_components, _SAMPLES, run.record.seed)
    say("measuring speed")
    speed = measure_speed(generator, params, data, config)

    plots.image_rows(
        run.figures / "reconstructions.png",
        {"test image": data.test.first(_SHOWN), "reconstruction": test.images[:_SHOWN]},
        f"{data.name}: latents of {config.latent_dim} numbers, found by the joint solve",
    )
    plots.image_grid(
        run.figures / "samples.png",
        np.asarray(generator.images(params, jnp.asarray(samples))),
        _SHOWN,
        f"{data.name}: samples",
    )
    _plot_objectives(run.figures / "objective.png", speed)
    _plot_residuals(run.figures / "residuals.png", generator, params, data, config)
    residual = {name: float(np.median(r)) for name, r in test.residual._asdict().items()}
    return {
        "psnr_test": psnr(float(test.squared_error.mean()) / pixels),
        "psnr_pca": psnr(pca_error(data.train, data.test, config.latent_dim)),
        "latent_dim": config.latent_dim,
        "kkt_state": residual["state"],
        "kkt_adjoint": residual["adjoint"],
        "kkt_stationarity": residual["stationarity"],
        **speed.summary(),
        "seconds_train": restored.notes["seconds"],
        "step": step,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "device": device_name(),
    }


def load_generator(
    config: Config, run: RunDirectory, shape: tuple[int, int, int]
) -> tuple[Generator, Restored]:
    """The generator and the newest undamaged checkpoint of a run.

    Raises:
        UserError: There is no checkpoint, or the images are not of the size trained on.
    """
    generator, params = build_generator(config, shape, run.record.seed)
    template = jax.eval_shape(lambda: initial_state(config, params, run.record.seed))
    restored = restore_newest(run.checkpoints, template, discard=False)
    if restored is None:
        raise UserError(
            f"{run.path} has no checkpoint yet; train first with `python -m "
            f"experiments.generative train --run-dir {run.path} --resume`."
        )
    return generator, restored


def _training_latents(
    generator: Generator, params: PyTree, data: ImageData, config: Config
) -> np.ndarray:
    """The latents of the first training images."""
    images = data.train.first(config.mixture_images)
    size = min(config.evaluation_batch, len(data.test))
    chunks = (images[start : start + size] for start in range(0, len(images), size))
    return infer(generator, params, chunks, config).latents


def _plot_objectives(path: Path, speed: Comparison) -> None:
    labels = {"joint": "joint", "nested": "nested, tuned", "published": "nested, published"}
    curves = {
        labels[kind]: plots.Curve.quartiles(1e3 * seconds, np.maximum(gap, _SMALLEST_GAP))
        for kind, (seconds, gap) in speed.gaps().items()
    }
    plots.curves(
        path,
        [curves],
        titles=["Inner objective (median and quartiles over test images)"],
        xlabels=[f"time of {len(speed.joint.reached)} problems together [ms]"],
        ylabels=["(objective - best) / (first - best)"],
        log_x=True,
    )


def _plot_residuals(
    path: Path, generator: Generator, params: PyTree, data: ImageData, config: Config
) -> None:
    # The size of the reconstruction's batches, for which the solve is compiled already.
    targets = jnp.asarray(data.test.first(config.evaluation_batch))
    history = solve(generator, params, targets, config).history
    steps = np.arange(1, config.evaluation_steps + 1)
    curves = {
        name: plots.Curve.quartiles(steps, np.asarray(values))
        for name, values in history.residual._asdict().items()
    }
    plots.curves(
        path,
        [curves],
        titles=["KKT residuals of the joint solve (median and quartiles)"],
        xlabels=["iteration"],
        ylabels=["residual"],
    )
