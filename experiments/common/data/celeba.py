"""CelebA's aligned faces, read from their jpgs when asked for: memory stays bounded."""

from __future__ import annotations

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.common.data.files import Files, Folder, ZipArchive
from experiments.common.data.images import ImageData, Split, to_unit
from experiments.common.data.location import damaged, missing
from experiments.common.errors import UserError, reason
from experiments.common.terminal import warn

_CROP = 148  # side of the centre crop, in pixels (REFERENCE: the published preparation)
_SIZE = (64, 64)
_PARTITION = "list_eval_partition.txt"
_PARTITION_TEST = "2"
_TEST_SHARE = 0.1
_END_OF_IMAGE = b"\xff\xd9"
_THREADS = 8


def load(root: Path, size: tuple[int, int] | None = None) -> ImageData:
    """The faces of `celeba/`: jpgs in a folder, nested or not, or `img_align_celeba.zip`.

    Each image is cropped to its central 148x148 pixels and resized. The test split is that of
    `list_eval_partition.txt` where `celeba/` holds it, else the last tenth in the order of names.
    jpgs that cannot be read are counted, skipped and mentioned in a warning.

    Args:
        root: The data root.
        size: (height, width) after resizing; None for the published 64x64.

    Raises:
        UserError: There are no jpgs, too few, or of differing or too small sizes.
    """
    files, names = _find(root)
    names = _readable(files, names)
    if len(names) < 2:
        raise UserError(
            f"{files.place} holds {len(names)} readable jpgs; at least two are needed, "
            "one to train and one to test."
        )
    test = _test_names(root, names)
    target = _SIZE if size is None else size
    return ImageData(
        "celeba",
        train=Split(JpegImages(files, tuple(n for n in names if n not in test), target)),
        test=Split(JpegImages(files, tuple(n for n in names if n in test), target)),
    )


@dataclass(frozen=True, eq=False)
class JpegImages:
    """Images decoded, cropped and resized each time they are read.

    Attributes:
        files: Where the jpgs are.
        names: The jpgs, in order.
        size: (height, width) of an image that is read.
    """

    files: Files
    names: tuple[str, ...]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        return *self.size, 3

    @property
    def in_memory(self) -> bool:
        """Whether reading costs no more than a copy."""
        return False

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images of these indices: float32 [len(indices), H, W, 3] in [0, 1].

        In the place of a jpg that cannot be decoded stands the next one that can.

        Raises:
            UserError: A jpg, or the folder or archive, is not there any more or cannot be read.
        """
        if len(indices) == 0:
            return np.zeros((0, *self.shape), np.float32)
        return to_unit(np.stack([self._decode(int(index)) for index in indices]))

    def _decode(self, index: int) -> np.ndarray:
        for offset in range(len(self.names)):
            name = self.names[(index + offset) % len(self.names)]
            try:
                with self.files.open(name) as file, Image.open(file) as image:
                    return self._prepare(image)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    # The system's, not Pillow's: others would take the place of all images.
                    raise damaged(
                        "celeba", f"{self.files.place}/{name}", f"cannot be read ({reason(error)})"
                    ) from error
                warn(f"{self.files.place}/{name} cannot be decoded ({error}): the next is used.")
        raise UserError(f"none of the {len(self.names)} jpgs of {self.files.place} can be decoded.")

    def _prepare(self, image: Image.Image) -> np.ndarray:
        left, top = (image.width - _CROP) // 2, (image.height - _CROP) // 2
        square = image.convert("RGB").crop((left, top, left + _CROP, top + _CROP))
        height, width = self.size
        return np.asarray(square.resize((width, height), Image.Resampling.LANCZOS))


def _find(root: Path) -> tuple[Files, list[str]]:
    """The first place that holds jpgs, and their names."""
    folder = root / "celeba"
    archive = folder / "img_align_celeba.zip"
    places: list[Files] = []
    if folder.is_dir():
        places.append(Folder(folder))
    if archive.is_file():
        try:
            places.append(ZipArchive(archive))
        except zipfile.BadZipFile as error:
            raise damaged("celeba", archive, f"is truncated or no zip archive ({error})") from error
    for files in places:
        names = [name for name in files.names() if name.lower().endswith((".jpg", ".jpeg"))]
        if names:
            return files, names
    raise missing("celeba", "celeba/img_align_celeba/*.jpg", root)


def _readable(files: Files, names: list[str]) -> list[str]:
    """The names whose jpgs have a whole header and an end; all must have the same size."""
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda name: _inspect(files, name), names))
    good = [(name, size) for name, size in zip(names, sizes, strict=True) if size is not None]
    if len(good) < len(names):
        bad = next(name for name, size in zip(names, sizes, strict=True) if size is None)
        warn(
            f"{len(names) - len(good)} of {len(names)} jpgs in {files.place} are damaged and "
            f"skipped, {bad} first."
        )
    for name, size in good:
        if size != good[0][1]:
            raise UserError(
                f"the jpgs in {files.place} differ in size: {good[0][0]} is "
                f"{good[0][1][0]}x{good[0][1][1]}, {name} is {size[0]}x{size[1]}; "
                "only aligned images of one size can be used."
            )
        if min(size) < _CROP:
            raise UserError(
                f"{files.place}/{name} is {size[0]}x{size[1]}; the aligned images must be at "
                f"least {_CROP}x{_CROP}."
            )
    return [name for name, _ in good]


def _inspect(files: Files, name: str) -> tuple[int, int] | None:
    """(width, height) from the header, or None where the jpg is cut off or no jpg at all."""
    try:
        with files.open(name) as file:
            content = file.read()
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            size = image.size
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    # Decoding everything would take minutes; a missing end marker finds what is cut off.
    return size if _END_OF_IMAGE in content[-64:] else None


def _test_names(root: Path, names: list[str]) -> frozenset[str]:
    partition = root / "celeba" / _PARTITION
    if not partition.is_file():
        count = max(1, round(_TEST_SHARE * len(names)))
        return frozenset(names[-count:])
    listed = (line.split() for line in partition.read_text(errors="replace").splitlines())
    chosen = {words[0] for words in listed if len(words) == 2 and words[1] == _PARTITION_TEST}
    test = frozenset(name for name in names if name.rpartition("/")[2] in chosen)
    if not test or len(test) == len(names):
        raise UserError(
            f"{partition} puts {len(test)} of the {len(names)} jpgs into the test split; both "
            "splits need images: complete the file, or delete it to have the last tenth tested."
        )
    return test
