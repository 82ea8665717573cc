"""How near samples come to the test images, on the features of the run's own classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.common.cli import Summary
from experiments.common.data import ImageData
from experiments.common.frechet import frechet_distance, precision_recall
from experiments.generative.classifier import FeatureExtractor
from experiments.generative.config import Config
from experiments.generative.problem import Generator
from experiments.generative.sampling import samplers
from experiments.generative.vae import VAE, Parameters

PyTree = Any

MOST = 10_000  # images compared, at most
_CHUNK = 256  # latents run through a generator at once


class Samples(NamedTuple):
    """New images of one model.

    Attributes:
        latents: [N, latent_dim].
        images: [N, H, W, C] in [0, 1].
    """

    latents: np.ndarray
    images: np.ndarray


def generate(generator: Generator, params: PyTree, latents: np.ndarray) -> Samples:
    """Run latents through the generator, a fixed number at once."""
    count = len(latents)
    missing = -count % _CHUNK
    padded = np.concatenate([latents, np.repeat(latents[-1:], missing, axis=0)])
    parts = [
        np.asarray(generator.images(params, jnp.asarray(padded[start : start + _CHUNK])))
        for start in range(0, len(padded), _CHUNK)
    ]
    return Samples(latents, np.concatenate(parts)[:count])


def sample_joint(
    generator: Generator, params: PyTree, latents: np.ndarray, config: Config, count: int, seed: int
) -> dict[str, Samples]:
    """Samples of the jointly trained generator, by the name of the latents' distribution.

    Args:
        generator: The network.
        params: Its parameters.
        latents: Latents of training images, [N, latent_dim].
        config: Settings.
        count: Images of each.
        seed: Seed of fits and draws.
    """
    return {
        name: generate(generator, params, sample(latents, count, seed))
        for name, sample in samplers(config.mixture_components).items()
    }


def sample_vae(
    vae: VAE, params: Parameters, data: ImageData, config: Config, count: int, seed: int
) -> dict[str, Samples]:
    """Samples of the autoencoder: from its prior, and from a mixture on its training latents."""
    prior = np.random.default_rng(seed).normal(size=(count, config.latent_dim))
    latents = vae.latents(params, data.train.first(config.mixture_images))
    drawn = samplers(config.mixture_components)["mixture"](latents, count, seed)
    generator = vae.generator
    return {
        "prior": generate(generator, params.generator, prior.astype(np.float32)),
        "mixture": generate(generator, params.generator, drawn),
    }


def compare_distributions(
    extractor: FeatureExtractor,
    data: ImageData,
    joint: Mapping[str, Samples],
    vae: Mapping[str, Samples],
) -> tuple[Summary, str]:
    """Fréchet distances to the test images, precision and recall.

    `frechet_joint` is of the sampler that comes nearest to the *training* images; `frechet_vae` is
    of the prior. The further ones are reported by name, and those of `to_train` are distances to
    training images: where test images are of classes of their own, such as people, these tell more.

    Returns:
        (results, name of the sampler of the joint generator that was chosen).
    """
    count = min(len(data.test), len(data.train), MOST)
    test = extractor.features(data.test.first(count))
    # Spread evenly: where images are sorted by class, the first would be of a few classes only.
    spread = np.linspace(0, len(data.train) - 1, count).astype(int)
    train = extractor.features(data.train.images.read(spread))
    # As many again: distances, precision and recall depend on the number of images.
    features = {name: extractor.features(drawn.images[:count]) for name, drawn in joint.items()}
    chosen = min(features, key=lambda name: frechet_distance(features[name], train))
    of_vae = {name: extractor.features(drawn.images[:count]) for name, drawn in vae.items()}

    summary: Summary = {
        "frechet_joint": frechet_distance(features[chosen], test),
        "frechet_vae": frechet_distance(of_vae["prior"], test),
        "frechet_train": frechet_distance(train, test),
        "sampler_joint": chosen,
    }
    summary |= {f"frechet_joint_{name}": frechet_distance(f, test) for name, f in features.items()}
    summary["frechet_vae_mixture"] = frechet_distance(of_vae["mixture"], test)
    for label, drawn in (
        ("joint", features[chosen]),
        ("vae", of_vae["prior"]),
        ("vae_mixture", of_vae["mixture"]),
    ):
        summary[f"frechet_{label}_to_train"] = frechet_distance(drawn, train)
        precision, recall = precision_recall(test, drawn)
        summary |= {f"precision_{label}": precision, f"recall_{label}": recall}
    accuracy = extractor.accuracy(data.test)
    if accuracy is not None:
        summary["classifier_accuracy"] = accuracy
    return summary, chosen
