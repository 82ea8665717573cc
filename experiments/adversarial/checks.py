"""What attacks accept."""

from __future__ import annotations

import numpy as np

from experiments.adversarial.problem import Sizes


def check_images(sizes: Sizes, images: np.ndarray, labels: np.ndarray, radius: float) -> None:
    """Refuses what an attack cannot be run on.

    Args:
        sizes: of the model.
        images: [N, H, W, C] of a floating dtype, in [0, 1].
        labels: int [N], each a class of the model.
        radius: finite, at least 0.

    Raises:
        ValueError: if one of them is not as described.
    """
    if images.ndim != 4 or images.shape[1:] != sizes.image_shape or len(images) == 0:
        height, width, channels = sizes.image_shape
        raise ValueError(
            f"images have shape {images.shape}, but the model takes [N, {height}, {width}, "
            f"{channels}] with at least one image; reshape or resize them."
        )
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"images are of type {images.dtype}, but floating-point pixels in [0, 1] are expected; "
            "divide 8-bit pixels by 255."
        )
    if np.isnan(images).any():
        count = int(np.isnan(images).any(axis=(1, 2, 3)).sum())
        raise ValueError(f"{count} of {len(images)} images have NaN pixels; leave them out.")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"pixels lie between {images.min():g} and {images.max():g}, but the box is [0, 1]; "
            "rescale the images."
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype}{list(labels.shape)}, but one integer for each of the "
            f"{len(images)} images is expected."
        )
    if labels.min() < 0 or labels.max() >= sizes.classes:
        raise ValueError(
            f"labels lie between {labels.min()} and {labels.max()}, but the model has the classes "
            f"0 to {sizes.classes - 1}."
        )
    if not (np.isfinite(radius) and radius >= 0):
        raise ValueError(f"radius={radius!r} was given, but a number of at least 0 is expected.")
