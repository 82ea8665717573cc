"""The prior of the latents: a normal distribution that standardises them, or a mixture of several.

A generator that was trained by its reconstructions alone gives its latents whatever distribution it
likes. One normal distribution covers places where no image lives; a hidden part of an image is
then filled with what no image has.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

_LEAST_VARIANCE = 1e-4  # of a latent's principal component, relative to the mean of all
_COMPONENT_VARIANCE = 1e-2  # least of a component, where that of all latents is 1
_SEED = 0
_EM_STEPS = 50


class Components(NamedTuple):
    """A mixture of normal distributions of the standardised latents u.

    Attributes:
        log_weights: Logarithm of each one's share, plus that of the determinant of its root, [K].
        means: [K, latent_dim].
        roots: Matrices R whose products R R^T are the inverse covariances, [K, latent_dim,
            latent_dim].
    """

    log_weights: Array
    means: Array
    roots: Array


class Prior(NamedTuple):
    """Latents `x = centre + factor u`, and how likely each u is.

    Attributes:
        centre: [latent_dim].
        factor: [latent_dim, latent_dim].
        components: Of u. A single standard normal distribution may be there several times, so
            that priors to choose from have the same shapes.
    """

    centre: Array
    factor: Array
    components: Components

    @classmethod
    def standard(cls, latent_dim: int, slots: int = 1) -> Prior:
        """The standard normal distribution, an autoencoder's own prior; `slots` components."""
        return cls(jnp.zeros(latent_dim), jnp.eye(latent_dim), _normal(latent_dim, slots))

    @classmethod
    def of(cls, latents: np.ndarray, components: int = 1, slots: int | None = None) -> Prior:
        """A mixture fitted to latents [N, latent_dim], one component being a normal distribution.

        Args:
            latents: [N, latent_dim]; N at least `components`.
            components: Of the mixture, fitted by expectation maximisation.
            slots: Places for components, at least as many; None is as many.
        """
        latents = latents.astype(np.float64)
        dimension = latents.shape[1]
        variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(latents, rowvar=False)))
        spread = np.sqrt(np.maximum(variances, _LEAST_VARIANCE * variances.mean()))
        centre, factor = latents.mean(axis=0), (axes * spread) @ axes.T
        slots = components if slots is None else slots
        if components == 1:
            mixture = _normal(dimension, slots)
        else:
            mixture = _fitted(np.linalg.solve(factor, (latents - centre).T).T, components, slots)
        return cls(jnp.asarray(centre, jnp.float32), jnp.asarray(factor, jnp.float32), mixture)

    def latents(self, u: Array) -> Array:
        """The latents x, [B, latent_dim], of standardised ones."""
        return self.centre + u @ self.factor.T

    def energy(self, u: Array) -> Array:
        """Twice the negative log density of u [B, latent_dim], up to a constant: [B].

        Of a single standard normal distribution it is `||u||^2`.
        """
        log_weights, means, roots = self.components
        slots, dimension = means.shape
        # One product for all components: a batch of small ones takes twice as long on a CPU.
        together = u @ jnp.swapaxes(roots, 0, 1).reshape(dimension, -1)
        centres = jnp.einsum("kd,kde->ke", means, roots)
        whitened = together.reshape(-1, slots, dimension) - centres
        exponents = log_weights - jnp.sum(whitened**2, axis=-1) / 2
        return -2 * jax.scipy.special.logsumexp(exponents, axis=-1)


def _normal(dimension: int, slots: int) -> Components:
    return Components(
        jnp.full((slots,), -np.log(slots), jnp.float32),
        jnp.zeros((slots, dimension)),
        jnp.tile(jnp.eye(dimension), (slots, 1, 1)),
    )


def _fitted(u: np.ndarray, components: int, slots: int) -> Components:
    """A mixture of u; slots that are left over are empty."""
    mixture = GaussianMixture(
        components, reg_covar=_COMPONENT_VARIANCE, max_iter=_EM_STEPS, random_state=_SEED
    )
    with warnings.catch_warnings():
        # That the likelihood still rises a little after these steps changes no restoration.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(u)
    roots = mixture.precisions_cholesky_
    volumes = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)
    empty = slots - components
    return Components(
        jnp.asarray(np.pad(np.log(mixture.weights_) + volumes, (0, empty),
                           constant_values=-np.inf), jnp.float32),
        jnp.asarray(np.pad(mixture.means_, ((0, empty), (0, 0))), jnp.float32),
        jnp.asarray(np.pad(roots, ((0, empty), (0, 0), (0, 0))), jnp.float32),
    )  # fmt: skip
