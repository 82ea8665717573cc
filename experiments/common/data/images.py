"""The types in which images travel: in memory or read when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from experiments.common.errors import UserError


class Images(Protocol):
    """A sequence of equally large images, read by index."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""

    @property
    def in_memory(self) -> bool:
        """Whether reading costs no more than a copy."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images of these indices: float32 [len(indices), H, W, C] in [0, 1]."""


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images held in one array.

    Attributes:
        pixels: [N, H, W, C], uint8, or float32 in [0, 1].
    """

    pixels: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        _, height, width, channels = self.pixels.shape
        return height, width, channels

    @property
    def in_memory(self) -> bool:
        """Whether reading costs no more than a copy."""
        return True

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images of these indices: float32 [len(indices), H, W, C] in [0, 1]."""
        return to_unit(self.pixels[indices])


@dataclass(frozen=True, eq=False)
class Split:
    """One half of a data set.

    Attributes:
        images: The images.
        labels: int32 [N], or None where the data set has none.
    """

    images: Images
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> np.ndarray:
        """The first images, at most `count` of them: float32 [N, H, W, C] in [0, 1]."""
        return self.images.read(np.arange(min(count, len(self))))

    def in_batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.images.read(np.arange(start, min(start + size, len(self))))


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set whose test images are never among its training images."""

    name: str
    train: Split
    test: Split

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        return self.train.images.shape


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels as float32 in [0, 1]; uint8 is divided by 255, float32 is taken as it is."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels.astype(np.float32)


def resized(pixels: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Each image resized, antialiased, to (height, width).

    Args:
        pixels: uint8 [N, H, W, C] with 1 or 3 channels.
        size: (height, width), or None to return `pixels` unchanged.
    """
    if size is None or pixels.shape[1:3] == tuple(size):
        return pixels
    height, width = size
    images = (
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels
    )
    smaller = [
        np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)) for image in images
    ]
    return np.stack(smaller).reshape(len(pixels), height, width, pixels.shape[-1])


def no_resizing(name: str, size: tuple[int, int] | None, native: tuple[int, int]) -> None:
    """Refuse a size that a data set of fixed size does not have."""
    if size is not None and tuple(size) != native:
        raise UserError(
            f"{name} images are {native[0]}x{native[1]}; ask for that size or for none, "
            f"not for {size[0]}x{size[1]}."
        )
