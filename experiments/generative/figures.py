"""The figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.common import plots
from experiments.common.data import ImageData
from experiments.generative.config import Config
from experiments.generative.distributions import Samples, generate
from experiments.generative.inference import solve
from experiments.generative.problem import Generator

PyTree = Any

SHOWN = 12  # images a row
_ROWS = 5
NEEDED = SHOWN * _ROWS  # samples
_SEARCHED = 10_000  # training images that the nearest one is looked for among, at most


def samples(path: Path, drawn: Samples, title: str) -> None:
    """A grid of samples."""
    plots.image_grid(path, drawn.images[:NEEDED], SHOWN, title)


def nearest(path: Path, drawn: Samples, data: ImageData) -> None:
    """Samples above the training images nearest to them, pixel by pixel."""
    shown = drawn.images[:SHOWN]
    train = data.train.first(_SEARCHED)
    plots.image_rows(
        path,
        {"sample": shown, "nearest": train[nearest_indices(shown, train)]},
        f"{data.name}: samples and the nearest of {len(train)} training images",
    )


def nearest_indices(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each image the index of the one that differs least from it in squares, int [N]."""
    flat = among.reshape(len(among), -1)
    return np.array([np.argmin(np.sum((flat - image.ravel()) ** 2, axis=1)) for image in images])


def interpolation(
    path: Path, generator: Generator, params: PyTree, latents: np.ndarray, data: ImageData
) -> None:
    """Rows that lead from one test image's latent to another's along a straight line."""
    # Where there are fewer images than ends, they come again.
    pairs = latents[np.arange(2 * _ROWS) % len(latents)].reshape(_ROWS, 2, -1)
    share = np.linspace(0, 1, SHOWN, dtype=np.float32)[:, None]
    lines = np.concatenate([(1 - share) * a + share * b for a, b in pairs])
    plots.image_grid(
        path,
        generate(generator, params, lines).images,
        SHOWN,
        f"{data.name}: between the latents of two test images",
    )


def residuals(
    path: Path, generator: Generator, params: PyTree, data: ImageData, config: Config
) -> None:
    """The KKT residuals over the iterations of one batch; problems that are done keep theirs."""
    # The size of the reconstruction's batches, for which the solve is compiled already.
    targets = jnp.asarray(data.test.first(config.evaluation_batch))
    history = solve(generator, params, targets, config).history
    steps = np.arange(1, config.evaluation_steps + 1)
    curves = {
        name: plots.Curve.quartiles(steps, plots.held(np.asarray(values)))
        for name, values in history.residual._asdict().items()
    }
    plots.curves(
        path,
        [curves],
        titles=["KKT residuals of the joint solve (median and quartiles)"],
        xlabels=["iteration"],
        ylabels=["residual"],
    )
