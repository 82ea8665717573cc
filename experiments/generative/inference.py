"""Latent codes of many images: the joint solve in batches of one size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jdeq
from experiments.generative.config import Config
from experiments.generative.problem import Generator, squared_error

PyTree = Any

_RTOL = 1e-3


class Inferred(NamedTuple):
    """What the joint solve found for each image.

    Attributes:
        latents: [N, latent_dim].
        images: What the generator makes of them, at their equilibrium: [N, H, W, C] in [0, 1].
        squared_error: Sum of squared differences to the targets, [N].
        residual: KKT residuals, [N] each.
        result: `jdeq.Result` codes, [N].
    """

    latents: np.ndarray
    images: np.ndarray
    squared_error: np.ndarray
    residual: jdeq.KKTResidual
    result: np.ndarray


def infer(
    generator: Generator, params: PyTree, batches: Iterable[np.ndarray], config: Config
) -> Inferred:
    """Solve for the latents of all images.

    Args:
        generator: The network.
        params: Its parameters.
        batches: Images [n, H, W, C] in [0, 1]; all batches but the last have the same n.
        config: Settings; `evaluation_steps` limits the solve.
    """
    parts = []
    size = None
    for images in batches:
        size = len(images) if size is None else size
        targets = jnp.asarray(filled(images, size))
        solution = solve(generator, params, targets, config)
        # The image of the latent is that of its equilibrium, which the solve's z only approaches.
        made = generator.images(params, solution.value.x)
        errors = squared_error(made, targets)
        found = (solution.value.x, made, errors, solution.residual, solution.result)
        parts.append(Inferred(*_first(found, len(images))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def solve(generator: Generator, params: PyTree, targets: jax.Array, config: Config) -> Any:
    """The joint solve of one batch as the evaluation does it, with its history."""
    x0, z0 = generator.start(params, len(targets))
    # Below the rounding unit of the states no residual falls.
    rtol = max(_RTOL, float(jnp.finfo(jnp.dtype(config.state_dtype)).eps))
    return jdeq.joint_solve(
        generator.problem,
        params,
        targets,
        x0,
        z0,
        rtol=rtol,
        max_steps=config.evaluation_steps,
        history=True,
    )


def _first(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], tree)


def filled(images: np.ndarray, size: int) -> np.ndarray:
    """The last batch, filled up by repeating its last image, so that nothing compiles anew."""
    missing = size - len(images)
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
