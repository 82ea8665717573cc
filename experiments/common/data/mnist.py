"""MNIST in its published format: gzipped (or unpacked) idx files."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from experiments.common.data.images import ArrayImages, ImageData, Split, resized
from experiments.common.data.location import damaged, missing

_UINT8 = 0x08  # the idx code of unsigned bytes, the only type MNIST uses


def load(root: Path, size: tuple[int, int] | None = None) -> ImageData:
    """The images and labels of `mnist/*-ubyte.gz`, as many as the files hold.

    Args:
        root: The data root.
        size: (height, width) to resize to; None keeps 28x28.

    Raises:
        UserError: A file is missing, truncated or of the wrong shape.
    """
    train, test = _split(root, "train", size), _split(root, "t10k", size)
    if train.images.shape != test.images.shape:
        sizes = ["x".join(map(str, split.images.shape[:2])) for split in (train, test)]
        problem = f"holds images of {sizes[1]} where those of the training are {sizes[0]}"
        raise damaged("mnist", _find(root, "t10k-images-idx3-ubyte"), problem)
    return ImageData("mnist", train=train, test=test)


def _split(root: Path, part: str, size: tuple[int, int] | None) -> Split:
    images_path = _find(root, f"{part}-images-idx3-ubyte")
    labels_path = _find(root, f"{part}-labels-idx1-ubyte")
    images = read_idx(images_path, dimensions=3)
    labels = read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise damaged("mnist", labels_path, f"has {len(labels)} labels for {len(images)} images")
    if images.size == 0:
        raise damaged("mnist", images_path, "holds no images")
    return Split(ArrayImages(resized(images[..., None], size)), labels.astype(np.int32))


def _find(root: Path, stem: str) -> Path:
    for name in (f"{stem}.gz", stem):
        if (root / "mnist" / name).is_file():
            return root / "mnist" / name
    raise missing("mnist", f"mnist/{stem}.gz", root)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an idx file of unsigned bytes, with its sizes read from the header.

    Args:
        path: An idx file; one named `*.gz` is decompressed.
        dimensions: How many axes the array must have.

    Raises:
        UserError: The file is truncated, is no idx file or has another number of axes.
    """
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise damaged("mnist", path, f"is truncated or not readable ({error})") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:2] != b"\0\0" or content[2] != _UINT8:
        raise damaged("mnist", path, "is not an idx file of unsigned bytes")
    if content[3] != dimensions:
        raise damaged("mnist", path, f"has {content[3]} axes where {dimensions} are expected")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - header != expected:
        raise damaged(
            "mnist",
            path,
            f"holds {len(content) - header} bytes where its header announces {expected}",
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
