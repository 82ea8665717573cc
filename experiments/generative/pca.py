"""The linear yardstick: principal components, as many as the latent code has dimensions."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA, IncrementalPCA

from experiments.common.data import Split

_IN_MEMORY = 2**30  # bytes of float32 training images up to which they are fitted at once
_CHUNK = 4096


def pca_error(train: Split, test: Split, components: int) -> float:
    """Mean squared error, over all test pixels, of the projection on the training components.

    Args:
        train: Images that the components are fitted to.
        test: Images that are projected.
        components: Number of components; no more than there are training images or pixels.
    """
    pixels = int(np.prod(train.images.shape))
    components = min(components, len(train), pixels)
    if len(train) * pixels * 4 <= _IN_MEMORY:
        model = PCA(components, random_state=0).fit(_flat(train.first(len(train))))
    else:
        model = IncrementalPCA(components)
        for images in train.in_batches(_CHUNK):
            if len(images) >= components:  # the last chunk may be too small to add anything
                model.partial_fit(_flat(images))
    error = 0.0
    for images in test.in_batches(_CHUNK):
        flat = _flat(images)
        error += float(np.sum((model.inverse_transform(model.transform(flat)) - flat) ** 2))
    return error / (len(test) * pixels)


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)
