"""New images: a Gaussian mixture on the training latents, sampled and run through the generator."""

from __future__ import annotations

import numpy as np
from sklearn.mixture import GaussianMixture

_REGULARISATION = 1e-2  # added to the variances of standardised latents


def sample_latents(latents: np.ndarray, components: int, count: int, seed: int) -> np.ndarray:
    """Draw from a full-covariance mixture fitted to the latents (REFERENCE: 20 components).

    Args:
        latents: [N, latent_dim].
        components: Components of the mixture, at most N.
        count: Number of draws.
        seed: Seed of fit and draws.

    Returns:
        float32 [count, latent_dim].
    """
    latents = latents.astype(np.float64)  # covariances of float32 come out indefinite
    centre, spread = latents.mean(axis=0), latents.std(axis=0) + 1e-8
    mixture = GaussianMixture(
        min(components, len(latents)), reg_covar=_REGULARISATION, random_state=seed
    )
    drawn, _ = mixture.fit((latents - centre) / spread).sample(count)
    order = np.random.default_rng(seed).permutation(count)  # drawn component by component
    return (drawn[order] * spread + centre).astype(np.float32)
