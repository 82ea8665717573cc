"""Restoring images of one's own, seen through a mask or an operator of one's own.

run = open_run(Path("runs/inverse/digits-..."), "inverse")
source = load_source(run.record.settings_as(Config), run, None)
params = Parameters(source.joint, source.prior(2048, components=5))
restored = restore(source.generator, params, images, mask=lambda images: images > 0)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jdeq
from experiments.common.errors import UserError
from experiments.generative.problem import Generator
from experiments.inverse.measurements import check_images
from experiments.inverse.problem import Parameters, inverse_problem

PyTree = Any


class Restoration(NamedTuple):
    """Restored images.

    Attributes:
        images: [B, H, W, C] in [0, 1].
        latents: [B, latent_dim].
        result: `jdeq.Result` codes of the solves, [B].
    """

    images: np.ndarray
    latents: np.ndarray
    result: np.ndarray


def restore(
    generator: Generator,
    params: Parameters,
    observed: np.ndarray,
    *,
    mask: Callable[[np.ndarray], np.ndarray] | None = None,
    operator: Callable[[Array], Array] | None = None,
    noise: float = 0.0,
    model_error: float = 1e-3,
    max_steps: int = 300,
) -> Restoration:
    """Restore images by the joint solve over the latents of a generator.

    Args:
        generator: The network.
        params: Its parameters and the prior of its latents.
        observed: [B, H, W, C] in [0, 1] up to the noise; with `operator` whatever that returns.
        mask: From the observed images to what is seen of them: 1 or true where a pixel is seen, 0
            or false where it is hidden, in a shape that broadcasts to theirs. Hidden pixels may
            hold anything. None sees all.
        operator: From images [B, H, W, C] in [0, 1] to what would be observed of them, image by
            image and differentiable; instead of a mask.
        noise: Standard deviation of Gaussian noise on what is observed.
        model_error: Mean squared error that the generator itself leaves; with the variance of the
            noise it weighs the prior.
        max_steps: Iterations of the solve, at most.

    Raises:
        UserError: Both a mask and an operator are given; the mask hides all of an image, has other
            values than 0 and 1 or another shape; the operator's values have another shape than what
            was observed; what is seen is not finite or not in [0, 1] up to the noise.
    """
    if mask is not None and operator is not None:
        raise UserError("a mask and an operator were given; put the mask into the operator.")
    how: PyTree
    if operator is None:
        seen = _seen(mask, observed)
        observed = np.where(seen > 0, observed, 0.0)
        check_images(observed, noise)
        how = jnp.asarray(seen)
        see: Callable[[Any, Array], Array] = jnp.multiply
    else:
        how = jnp.zeros(len(observed))
        see = _through(operator)
        _check_operator(generator, params, operator, observed)
    count = len(observed)
    _, z0 = generator.start(params.generator, count)
    solution = jdeq.joint_solve(
        inverse_problem(generator, see),
        params,
        jnp.asarray(observed, jnp.float32),
        jnp.zeros((count, generator.latent_dim)),
        z0,
        data=(how, jnp.full((count,), noise**2 + model_error)),
        max_steps=max_steps,
    )
    x = params.prior.latents(solution.value.x)
    images = generator.images(params.generator, x)
    return Restoration(np.asarray(images), np.asarray(x), np.asarray(solution.result))


def _through(operator: Callable[[Array], Array]) -> Callable[[Any, Array], Array]:
    return lambda how, images: operator(images)


def _seen(mask: Callable[[np.ndarray], np.ndarray] | None, observed: np.ndarray) -> np.ndarray:
    """The mask of every pixel, float32 like the images."""
    if mask is None:
        return np.ones(observed.shape, np.float32)
    given = np.asarray(mask(observed))
    try:
        seen = np.broadcast_to(given, observed.shape).astype(np.float32)
    except ValueError as error:
        raise UserError(
            f"the mask has shape {given.shape}, which does not broadcast to that of the images, "
            f"{observed.shape}."
        ) from error
    if not np.isin(seen, (0, 1)).all():
        raise UserError("the mask has values other than 0 (hidden) and 1 (seen).")
    hidden = np.flatnonzero(~seen.reshape(len(seen), -1).any(axis=1))
    if len(hidden):
        raise UserError(
            f"the mask hides all of image {hidden[0]} ({len(hidden)} of {len(seen)} images in "
            "all); show at least one pixel of each, or leave those images out."
        )
    return seen


def _check_operator(
    generator: Generator,
    params: Parameters,
    operator: Callable[[Array], Array],
    observed: np.ndarray,
) -> None:
    if not np.isfinite(observed).all():
        raise UserError("some observed values are not finite; leave them out of the operator.")

    def values() -> Array:
        _, z0 = generator.start(params.generator, len(observed))
        return operator(generator.decode(params.generator, z0))

    shape = jax.eval_shape(values).shape
    if shape != observed.shape:
        raise UserError(
            f"the operator returns values of shape {shape}, but what was observed has shape "
            f"{observed.shape}; both need one entry an image along their first axis."
        )
