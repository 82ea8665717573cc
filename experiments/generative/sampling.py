"""Latents of new images: three distributions fitted to the training images' latents.

All work on standardised latents, of which each entry has mean 0 and variance 1.

normal           entries independent and standard normal
mixture          a full-covariance Gaussian mixture
vae and mixture  the paper's: a small auxiliary autoencoder compresses the latents, the mixture is
                 fitted to its codes, and what is drawn from it is decoded
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.mixture import GaussianMixture

from experiments.generative.latent_vae import LatentVAE

_REGULARISATION = 1e-2  # added to the variances of standardised latents


@dataclass(frozen=True, eq=False)
class Standardised:
    """Latents whose entries have mean 0 and variance 1.

    Attributes:
        values: float64 [N, latent_dim]; covariances of float32 come out indefinite.
        centre: What was subtracted, [latent_dim].
        spread: What was divided by, [latent_dim].
    """

    values: np.ndarray
    centre: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, latents: np.ndarray) -> Standardised:
        """Standardise latents [N, latent_dim]."""
        latents = latents.astype(np.float64)
        centre, spread = latents.mean(axis=0), latents.std(axis=0) + 1e-8
        return cls((latents - centre) / spread, centre, spread)

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Standardised values as latents: float32 [M, latent_dim]."""
        return (values * self.spread + self.centre).astype(np.float32)


def sample_normal(latents: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw entries independently, each with the mean and the variance it has in the latents.

    Args:
        latents: [N, latent_dim].
        count: Number of draws.
        seed: Seed of the draws.

    Returns:
        float32 [count, latent_dim].
    """
    standardised = Standardised.of(latents)
    drawn = np.random.default_rng(seed).normal(size=(count, latents.shape[1]))
    return standardised.restore(drawn)


def sample_latents(latents: np.ndarray, components: int, count: int, seed: int) -> np.ndarray:
    """Draw from a full-covariance mixture fitted to the latents (published: 20 components).

    Args:
        latents: [N, latent_dim].
        components: Components of the mixture, at most N.
        count: Number of draws.
        seed: Seed of fit and draws.

    Returns:
        float32 [count, latent_dim].
    """
    standardised = Standardised.of(latents)
    return standardised.restore(_draw(standardised.values, components, count, seed))


def sample_auxiliary(latents: np.ndarray, components: int, count: int, seed: int) -> np.ndarray:
    """Draw from a mixture on the codes of an auxiliary autoencoder of the latents, and decode.

    Args:
        latents: [N, latent_dim].
        components: Components of the mixture, at most N.
        count: Number of draws.
        seed: Seed of autoencoder, fit and draws.

    Returns:
        float32 [count, latent_dim].
    """
    standardised = Standardised.of(latents)
    autoencoder = LatentVAE.fit(standardised.values.astype(np.float32), seed)
    codes = autoencoder.encode(standardised.values.astype(np.float32)).astype(np.float64)
    drawn = _draw(codes, components, count, seed)
    return standardised.restore(autoencoder.decode(drawn.astype(np.float32)))


def samplers(components: int) -> dict[str, Callable[[np.ndarray, int, int], np.ndarray]]:
    """Name to `sample(latents, count, seed)` of the three distributions."""
    return {
        "normal": sample_normal,
        "mixture": lambda latents, count, seed: sample_latents(latents, components, count, seed),
        "auxiliary": lambda latents, count, seed: sample_auxiliary(
            latents, components, count, seed
        ),
    }


def _draw(values: np.ndarray, components: int, count: int, seed: int) -> np.ndarray:
    mixture = GaussianMixture(
        min(components, len(values)), reg_covar=_REGULARISATION, random_state=seed
    )
    drawn, _ = mixture.fit(values).sample(count)
    return drawn[np.random.default_rng(seed).permutation(count)]  # drawn component by component
