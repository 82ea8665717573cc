"""Image data sets in their publishers' formats, with train and test splits that never overlap.

`load_images` returns the data set of a name; `location.data_root` says where it is looked for;
`python -m experiments.common.data download NAME` fetches what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from experiments.common.data import celeba, cifar10, digits, faces, mnist
from experiments.common.data.images import ArrayImages, ImageData, Images, Split
from experiments.common.data.location import data_root
from experiments.common.data.order import batches
from experiments.common.errors import UserError

__all__ = [
    "ArrayImages",
    "ImageData",
    "Images",
    "Split",
    "batches",
    "data_root",
    "load_images",
]

_LOADERS: dict[str, Callable[[Path, tuple[int, int] | None], ImageData]] = {
    "digits": digits.load,
    "mnist": mnist.load,
    "cifar10": cifar10.load,
    "faces": faces.load,
    "celeba": celeba.load,
}


def load_images(
    name: str, root: str | Path | None = None, size: tuple[int, int] | None = None
) -> ImageData:
    """The train and test images of a data set.

    Args:
        name: `digits`, `mnist`, `cifar10`, `faces` or `celeba`.
        root: The folder that holds `mnist/`, `cifar10/`, ...; None for `JDEQ_DATA` or the cache.
        size: (height, width) to resize to; None keeps the images as they are (64x64 for celeba).

    Returns:
        Images [N, height, width, channels] in [0, 1], and labels where the data set has them.

    Raises:
        UserError: The name is unknown, or a file is missing, damaged or of the wrong shape.
    """
    if name not in _LOADERS:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(_LOADERS)}.")
    return _LOADERS[name](data_root(root), size)
