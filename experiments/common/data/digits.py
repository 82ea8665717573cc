"""The 1,797 handwritten digits, 8x8, that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.common.data.images import ArrayImages, ImageData, Split, no_resizing

_TEST_SHARE = 0.2


def load(root: Path, size: tuple[int, int] | None = None) -> ImageData:
    """A fixed split, stratified by digit: 1,437 training and 360 test images.

    Args:
        root: Not used: the images are embedded in scikit-learn.
        size: None or (8, 8).
    """
    # Other data sets need not wait for scikit-learn, which takes longer to import than the rest.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    del root
    no_resizing("digits", size, (8, 8))
    digits = load_digits()
    # The pixels count the ink in 4x4 blocks of a bitmap: 0 to 16.
    images = (digits.images / 16).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(images)), test_size=_TEST_SHARE, stratify=labels, random_state=0
    )
    return ImageData(
        "digits",
        train=Split(ArrayImages(images[train]), labels[train]),
        test=Split(ArrayImages(images[test]), labels[test]),
    )
