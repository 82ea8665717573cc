"""Variational dropout: one mask per image and channel, the same for a whole solve.

The equilibrium of a cell that draws anew at every evaluation is not defined. The masks are
therefore drawn before the solve, once per problem, and reach the cell as `data`:

    masks = variational_masks(key, rate=0.1, batch=B, widths=(24, 24))
    jdeq.deq(cell, params, x, z0, data=masks)      # cell(params, z, x, masks)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def variational_masks(
    key: Array,
    *,
    rate: float,
    batch: int,
    widths: Sequence[int],
    dtype: DTypeLike = jnp.float32,
) -> tuple[Array, ...]:
    """Draws dropout masks of one value per image and channel (Gal and Ghahramani, 2016).

    Args:
        key: random key.
        rate: probability of dropping a channel, in `[0, 1)`.
        batch: number of problems B.
        widths: channels C of each branch.
        dtype: of the masks.

    Returns:
        One array `[B, C]` a branch, each entry 0 with probability `rate` and `1 / (1 - rate)`
        otherwise, so that the mean is 1.

    Raises:
        ValueError: if `rate` is outside `[0, 1)`.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"variational_masks got rate={rate}: give a rate of at least 0, below 1.")
    keys = jax.random.split(key, len(widths))
    kept = [
        jax.random.bernoulli(k, 1 - rate, (batch, width))
        for k, width in zip(keys, widths, strict=True)
    ]
    return tuple(mask.astype(dtype) / (1 - rate) for mask in kept)


def apply_mask(x: Array, mask: Array | None) -> Array:
    """Multiplies `[B, ..., C]` by a mask `[B, C]`; None leaves it as it is."""
    if mask is None:
        return x
    return x * mask.reshape(mask.shape[0], *(1,) * (x.ndim - 2), mask.shape[-1]).astype(x.dtype)
