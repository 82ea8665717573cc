"""Evaluation of a run, from its directory and the data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import plots
from experiments.common.checkpoints import Restored, restore_newest
from experiments.common.cli import Summary
from experiments.common.data import ImageData, load_images
from experiments.common.devices import device_name
from experiments.common.errors import UserError
from experiments.common.metrics import psnr
from experiments.common.runs import RunDirectory
from experiments.common.speed_figure import objective_over_time
from experiments.common.terminal import say
from experiments.generative import figures
from experiments.generative.augmentation import augmented_split, augments
from experiments.generative.classifier import load_classifier
from experiments.generative.config import Config
from experiments.generative.distributions import (
    MOST,
    Samples,
    compare_distributions,
    sample_joint,
    sample_vae,
)
from experiments.generative.inference import infer
from experiments.generative.nested_training import load_nested, nested_error
from experiments.generative.pca import pca_error
from experiments.generative.problem import Generator, build_generator
from experiments.generative.speed import measure_speed
from experiments.generative.train import initial_state
from experiments.generative.vae import load_vae

PyTree = Any

_LEAST = 4  # test images: precision and recall look at the third neighbour, speed is tuned on some


def evaluate(config: Config, run: RunDirectory, data_root: Path | None) -> Summary:
    """Reconstruct the test images by every model, sample, and measure speed.

    Returns:
        The results; figures are written to the run directory. Without labels there is no
        classifier, and none of the keys that need its features.

    Raises:
        UserError: There is no checkpoint yet, the images are not of the size trained on, or there
            are too few.
    """
    data = load_images(config.dataset, data_root, config.image_size)
    if len(data.test) < _LEAST:
        raise UserError(
            f"{data.name} has {len(data.test)} test images; at least {_LEAST} are needed."
        )
    generator, restored = load_generator(config, run, data.shape)
    params, step = restored.state.params, restored.step
    if step < config.steps:
        say(f"the run is unfinished: evaluating step {step} of {config.steps}.")
    reconstruction = _reconstruct(config, run, data, generator, params)
    say("sampling new images")
    joint, vae = draw_samples(config, run, data, generator, params)
    distributions, chosen = _distributions(config, run, data, joint, vae)
    figures.samples(run.figures / "samples.png", joint[chosen], f"{data.name}: samples")
    figures.samples(
        run.figures / "samples_vae.png", vae["prior"], f"{data.name}: samples of the autoencoder"
    )
    figures.nearest(run.figures / "nearest.png", joint[chosen], data)
    say("measuring speed")
    speed = measure_speed(generator, params, data, config)
    objective_over_time(run.figures / "objective.png", speed, "Inner objective", "test images")
    figures.residuals(run.figures / "residuals.png", generator, params, data, config)
    return {
        **reconstruction,
        **distributions,
        **speed.summary(),
        "latent_dim": config.latent_dim,
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


def draw_samples(
    config: Config, run: RunDirectory, data: ImageData, generator: Generator, params: PyTree
) -> tuple[dict[str, Samples], dict[str, Samples]]:
    """Samples (of the joint generator, of the autoencoder) by the name of their distribution.

    As many of each as there are test images, at most 10,000, but enough for the figures.
    """
    count = max(min(len(data.test), MOST), figures.NEEDED)
    seed = run.record.seed
    vae, vae_params, _ = load_vae(config, run, data.shape)
    latents = training_latents(generator, params, data, config, config.mixture_images)
    joint = sample_joint(generator, params, latents, config, count, seed)
    return joint, sample_vae(vae, vae_params, data, config, count, seed)


def training_latents(
    generator: Generator, params: PyTree, data: ImageData, config: Config, count: int
) -> np.ndarray:
    """The latents of the first `count` training images, by the joint solve: [N, latent_dim]."""
    images = data.train.first(count)
    size = min(config.evaluation_batch, len(data.test))
    chunks = (images[start : start + size] for start in range(0, len(images), size))
    return infer(generator, params, chunks, config).latents


def _reconstruct(
    config: Config, run: RunDirectory, data: ImageData, generator: Generator, params: PyTree
) -> Summary:
    """Reconstruction of the test images by every model, with two figures."""
    size = min(config.evaluation_batch, len(data.test))
    pixels = int(np.prod(data.shape))
    say(f"reconstructing {len(data.test)} test images")
    test = infer(generator, params, data.test.in_batches(size), config)
    vae, vae_params, vae_seconds = load_vae(config, run, data.shape)
    encoded = vae.reconstruct(vae_params, data.test.in_batches(size))
    images = data.test.first(len(encoded))
    # The same decoder, its latents found by the joint solve: what the encoder's latents cost.
    searched = infer(generator, vae_params.generator, data.test.in_batches(size), config)
    nested, nested_params, nested_seconds = load_nested(config, run, data.shape)
    by_nested = nested_error(nested, nested_params, data.test, config)
    # From first to last: where images are sorted by person, the first are all of one.
    shown = np.linspace(0, len(images) - 1, min(figures.SHOWN, len(images))).astype(int)
    plots.image_rows(
        run.figures / "reconstructions.png",
        {
            "test image": images[shown],
            "joint": test.images[shown],
            "autoencoder": encoded[shown],
        },
        f"{data.name}: reconstructions from {config.latent_dim} numbers",
    )
    figures.interpolation(run.figures / "interpolation.png", generator, params, test.latents, data)
    residual = {name: float(np.median(r)) for name, r in test.residual._asdict().items()}
    return {
        "psnr_test": psnr(float(test.squared_error.mean()) / pixels),
        "psnr_vae": psnr(float(np.mean((encoded - images) ** 2, dtype=np.float64))),
        "psnr_vae_searched": psnr(float(searched.squared_error.mean()) / pixels),
        "psnr_nested": psnr(float(by_nested.mean()) / pixels),
        "psnr_pca": psnr(pca_error(data.train, data.test, config.latent_dim)),
        **pca_of_copies(config, run, data),
        "seconds_train_vae": vae_seconds,
        "seconds_train_nested": nested_seconds,
        "kkt_state": residual["state"],
        "kkt_adjoint": residual["adjoint"],
        "kkt_stationarity": residual["stationarity"],
    }


def pca_of_copies(config: Config, run: RunDirectory, data: ImageData) -> Summary:
    """Principal components of training images and transformed copies, if the training has these."""
    if not augments(config):
        return {}
    more = augmented_split(config, data.train, run.record.seed)
    return {"psnr_pca_augmented": psnr(pca_error(more, data.test, config.latent_dim))}


def _distributions(
    config: Config,
    run: RunDirectory,
    data: ImageData,
    joint: dict[str, Samples],
    vae: dict[str, Samples],
) -> tuple[Summary, str]:
    """Distances between distributions, and the sampler to show."""
    if data.train.labels is None:
        say(f"{data.name} has no labels: no classifier, no distances between distributions.")
        return {}, "mixture"
    extractor = load_classifier(config, run, data)
    return compare_distributions(extractor, data, joint, vae)
