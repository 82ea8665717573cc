"""The ORL (AT&T) faces: ten pictures of each person, split by person."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.common.data.files import Files, Folder, ZipArchive
from experiments.common.data.images import ArrayImages, ImageData, Split, resized
from experiments.common.data.location import damaged, missing
from experiments.common.errors import UserError

_PICTURE = re.compile(r"(?:^|/)s(\d+)/(\d+)\.pgm$")
_TEST_SHARE = 0.2
_SPLIT_SEED = 0


def load(root: Path, size: tuple[int, int] | None = None) -> ImageData:
    """The faces of `orl_faces/`, either `att_faces.zip` or unpacked `s1/1.pgm` and so on.

    A fifth of the people, drawn once for all, are the test split: none of their pictures is
    seen in training. The label is the number of the person.

    Args:
        root: The data root.
        size: (height, width) to resize to; None keeps 112x92.

    Raises:
        UserError: Nothing is there, or a picture is unreadable or of another size.
    """
    files, pictures = _find(root)
    images = resized(_read(files, [name for name, _ in pictures]), size)
    people = np.array([person for _, person in pictures], np.int32)
    known = np.unique(people)
    if len(known) < 2:
        raise UserError(
            f"{files.place} shows {len(known)} person; a split by person needs at least two."
        )
    count = max(1, round(_TEST_SHARE * len(known)))
    chosen = np.random.default_rng(_SPLIT_SEED).permutation(known)[:count]
    test = np.isin(people, chosen)
    return ImageData(
        "faces",
        train=Split(ArrayImages(images[~test]), people[~test]),
        test=Split(ArrayImages(images[test]), people[test]),
    )


def _find(root: Path) -> tuple[Files, list[tuple[str, int]]]:
    """The first place that holds pictures: (files, [(name, person), ...]) in numeric order."""
    folder = root / "orl_faces"
    archive = folder / "att_faces.zip"
    places: list[Files] = []
    if folder.is_dir():
        places.append(Folder(folder))
    if archive.is_file():
        try:
            places.append(ZipArchive(archive))
        except zipfile.BadZipFile as error:
            raise damaged("faces", archive, f"is truncated or no zip archive ({error})") from error
    for files in places:
        found = [(match, name) for name in files.names() if (match := _PICTURE.search(name))]
        if found:
            order = sorted((int(match[1]), int(match[2]), name) for match, name in found)
            return files, [(name, person) for person, _, name in order]
    raise missing("faces", "orl_faces/att_faces.zip", root)


def _read(files: Files, names: list[str]) -> np.ndarray:
    images = []
    for name in names:
        try:
            with files.open(name) as file, Image.open(file) as image:
                images.append(np.asarray(image.convert("L")))
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise damaged("faces", f"{files.place}/{name}", f"is unreadable ({error})") from error
        if images[-1].shape != images[0].shape:
            raise damaged(
                "faces",
                f"{files.place}/{name}",
                f"is {images[-1].shape[0]}x{images[-1].shape[1]} where the others are "
                f"{images[0].shape[0]}x{images[0].shape[1]}",
            )
    return np.stack(images)[..., None]
