"""Classical restorations, from scikit-image: total variation, biharmonic equation, bicubic."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic
from skimage.transform import resize

from experiments.inverse.measurements import Kind
from experiments.inverse.solvers import Batch, Restored

_BICUBIC = 3


def restore_classically(kind: Kind, batch: Batch, weight: float) -> Restored:
    """Restore a batch by the classical method of its problem.

    Args:
        kind: The problem.
        batch: Its observations.
        weight: Of total variation in denoising; unused otherwise.
    """
    observed = np.asarray(batch.observed)
    started = time.perf_counter()
    if kind.boxed:
        images = inpaint(observed, np.asarray(batch.how.mask))
    elif kind.factor > 1:
        images = upsample(observed[:, :: kind.factor, :: kind.factor], kind.factor)
    else:
        images = denoise(observed, weight)
    return Restored(images, time.perf_counter() - started)


def best_weight(batch: Batch, weights: Sequence[float]) -> float:
    """The weight of total variation by which noisy images come nearest to the clean ones."""
    observed = np.asarray(batch.observed)
    return min(weights, key=lambda w: float(batch.squared_errors(denoise(observed, w)).mean()))


def denoise(images: np.ndarray, weight: float) -> np.ndarray:
    """Total-variation denoising of images [N, H, W, C] (Chambolle, 2004), clipped to [0, 1]."""
    restored = [denoise_tv_chambolle(image, weight=weight, channel_axis=-1) for image in images]
    return np.clip(np.stack(restored), 0, 1)


def inpaint(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Hidden pixels by the biharmonic equation, clipped to [0, 1].

    Args:
        images: [N, H, W, C].
        mask: 1 where a pixel is seen, 0 where it is hidden, [N, H, W, 1].
    """
    restored = [
        inpaint_biharmonic(image, seen[..., 0] == 0, channel_axis=-1)
        for image, seen in zip(images, mask, strict=True)
    ]
    return np.clip(np.stack(restored), 0, 1)


def upsample(images: np.ndarray, factor: int) -> np.ndarray:
    """Bicubic upsampling of images [N, h, w, C] to [N, h factor, w factor, C], in [0, 1]."""
    _, height, width, channels = images.shape
    size = (height * factor, width * factor, channels)
    restored = [
        resize(image, size, order=_BICUBIC, mode="edge", anti_aliasing=False) for image in images
    ]
    return np.clip(np.stack(restored), 0, 1)
