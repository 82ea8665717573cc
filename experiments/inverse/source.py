"""The generative run that an inverse run builds on: trained inside it, or copied into it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import hosts
from experiments.common.data import ImageData, load_images
from experiments.common.errors import UserError
from experiments.common.runs import (
    RunDirectory,
    RunRecord,
    holds_run,
    is_trained,
    open_run,
    start_run,
)
from experiments.common.terminal import say
from experiments.generative import vae as autoencoder
from experiments.generative.augmentation import augmented_split, augments
from experiments.generative.config import PRESETS
from experiments.generative.config import Config as GenerativeConfig
from experiments.generative.evaluate import load_generator, training_latents
from experiments.generative.problem import Generator
from experiments.generative.train import train_joint
from experiments.inverse.config import Config
from experiments.inverse.prior import Prior

PyTree = Any

_FOLDER = "generator"
_COPIES_SEED = 0


class Source(NamedTuple):
    """What a generative run offers.

    Attributes:
        data: Its images.
        generator: The network, which its autoencoder has as decoder, too.
        config: Its settings.
        joint: Parameters that the joint training found.
        vae: Parameters of the autoencoder's decoder.
    """

    data: ImageData
    generator: Generator
    config: GenerativeConfig
    joint: PyTree
    vae: PyTree

    def prior(self, count: int, components: int = 1) -> Prior:
        """The distribution of the latents of the first training images, see `Prior.of`."""
        return Prior.of(self._latents(self.joint, count), components)

    def priors(self, config: Config) -> list[Prior]:
        """What the generator's prior is chosen from: mixtures of the latents it gives images."""
        return self._mixtures(self.joint, config)

    def vae_priors(self, config: Config) -> list[Prior]:
        """The same of the autoencoder's decoder, and its own prior before all."""
        slots = max(config.prior_components)
        own = Prior.standard(self.config.latent_dim, slots)
        return [own, *self._mixtures(self.vae, config)]

    def _mixtures(self, params: PyTree, config: Config) -> list[Prior]:
        latents = self._latents(params, config.prior_images)
        slots = max(config.prior_components)
        numbers = [count for count in config.prior_components if count <= len(latents)]
        return [Prior.of(latents, count, slots) for count in numbers]

    def _latents(self, params: PyTree, count: int) -> np.ndarray:
        train, data, config = self.data.train, self.data, self.config
        if augments(config):  # few images: their transformed copies tell more of what there may be
            data = replace(data, train=augmented_split(config, train, _COPIES_SEED))
        return training_latents(self.generator, params, data, config, count)


def adopt(config: Config, run: RunDirectory, source: Path) -> None:
    """Copy what is needed of a trained generative run into a new inverse run.

    Raises:
        UserError: It is no generative run, is not trained yet, or is of other images.
    """
    given = open_run(source, "generative")
    settings = given.record.settings_as(GenerativeConfig)
    if not is_trained(given):
        raise UserError(
            f"{source} holds an unfinished run; continue it with `python -m "
            f"experiments.generative train --run-dir {source} --resume`."
        )
    wanted = PRESETS[config.generator].dataset
    if settings.dataset != wanted:
        raise UserError(
            f"{source} was trained on {settings.dataset}, but this preset restores {wanted}; "
            "choose the preset of the same images."
        )
    folder = run.path / _FOLDER
    vae = Path(autoencoder.PART) / "checkpoints"
    for part in (Path("checkpoints"), vae):
        shutil.copytree(source / part, folder / part)
    shutil.copy(source / "config.json", folder)  # last: it makes the copy a run


def train_source(config: Config, run: RunDirectory, data_root: Path | None) -> None:
    """Train generator and autoencoder, each from its newest checkpoint, as far as needed."""
    inner = _open(config, run)
    settings = inner.record.settings_as(GenerativeConfig)
    data = load_images(settings.dataset, data_root, settings.image_size)
    if not is_trained(inner):
        say("training the variational autoencoder")
        autoencoder.train_vae(settings, inner, data)
        say("training the generator without a task")
        train_joint(settings, inner, data)


def load_source(config: Config, run: RunDirectory, data_root: Path | None) -> Source:
    """The trained models.

    Raises:
        UserError: They are not trained yet, or the images are not of the size trained on.
    """
    inner = _open(config, run)
    settings = inner.record.settings_as(GenerativeConfig)
    data = load_images(settings.dataset, data_root, settings.image_size)
    _, params, _ = autoencoder.load_vae(settings, inner, data.shape)
    generator, restored = load_generator(settings, inner, data.shape)
    return Source(data, generator, settings, restored.state.params, params.generator)


def _open(config: Config, run: RunDirectory) -> RunDirectory:
    folder = run.path / _FOLDER
    started: list[RunDirectory] = []

    def claim() -> str:
        if not holds_run(folder):
            settings = PRESETS[config.generator]
            record = RunRecord.new("generative", config.generator, run.record.seed, settings)
            started.append(start_run(folder, record))
        return ""

    hosts.from_first(claim)
    return started[0] if started else open_run(folder, "generative")
