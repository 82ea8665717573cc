"""CIFAR-10 in its published "python version": pickled batches."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.data.images import ArrayImages, ImageData, Split, resized
from experiments.common.data.location import damaged, missing

_FOLDER = "cifar-10-batches-py"
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = ("test_batch",)
_VALUES = 3 * 32 * 32


def load(root: Path, size: tuple[int, int] | None = None) -> ImageData:
    """The images and labels of `cifar10/cifar-10-batches-py/`, as many as the files hold.

    Args:
        root: The data root.
        size: (height, width) to resize to; None keeps 32x32.

    Raises:
        UserError: A file is missing, truncated or of the wrong shape.
    """
    return ImageData("cifar10", train=_split(root, _TRAIN, size), test=_split(root, _TEST, size))


def _split(root: Path, names: tuple[str, ...], size: tuple[int, int] | None) -> Split:
    parts = [_read_batch(root, name) for name in names]
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    return Split(ArrayImages(resized(images, size)), labels)


def _read_batch(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    path = root / "cifar10" / _FOLDER / name
    if not path.is_file():
        raise missing("cifar10", f"cifar10/{_FOLDER}/{name}", root)
    content = _unpickle(path)
    try:
        values, labels = np.asarray(content["data"]), np.asarray(content["labels"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged("cifar10", path, "lacks the entries `data` and `labels`") from error
    if values.dtype != np.uint8 or values.ndim != 2 or values.shape[1] != _VALUES:
        raise damaged(
            "cifar10",
            path,
            f"holds data of shape {values.shape} and type {values.dtype} where "
            f"[N, {_VALUES}] of uint8 is expected",
        )
    if labels.shape != (len(values),) or len(values) == 0:
        raise damaged("cifar10", path, f"has {labels.size} labels for {len(values)} images")
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise damaged("cifar10", path, "has labels that are no numbers of classes, from 0")
    return values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int32)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that builds NumPy arrays and plain values, and runs nothing else."""

    _ALLOWED = frozenset(
        (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        # The published files were written by Python 2: latin1 turns their keys into str.
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    # A damaged pickle raises whatever its wrong opcodes lead to.
    except Exception as error:
        raise damaged("cifar10", path, f"is truncated or no pickle ({error})") from error
