"""Omniglot's handwritten characters, split by alphabet, and Lake's one-shot runs."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from experiments.common.data.files import Files, Folder, ZipArchive
from experiments.common.data.location import damaged, missing
from experiments.common.data.tasks import Characters, Tasks
from experiments.common.errors import UserError

Source = Literal["resized", "public"]

EVALUATION_ALPHABETS = frozenset(
    {
        "Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta", "Ge_ez",
        "Glagolitic", "Gurmukhi", "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian",
        "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti", "Syriac_(Serto)", "Tengwar",
        "Tibetan", "ULOG",
    }
)  # fmt: skip
"""The published evaluation alphabets, for archives that do not say which split they hold."""

_PICTURE = re.compile(r"(?:^|/)([^/]+)/(character\d+)/([^/]+\.png)$")
_RUN_LABELS = re.compile(r"(?:^|/)(run\d+)/class_labels\.txt$")
_RESIZED = "omniglot_resized"


class OmniglotData(NamedTuple):
    """Characters whose alphabets are never in both splits.

    Attributes:
        train: Background characters; empty where there are none.
        test: Evaluation characters; empty where there are none.
    """

    train: Characters
    test: Characters


@dataclass(frozen=True)
class _Picture:
    """A png and what its path says."""

    files: Files
    name: str
    split: str | None
    alphabet: str
    character: str
    drawing: str


def load_omniglot(
    root: Path, size: tuple[int, int] | None = (28, 28), source: Source | None = None
) -> OmniglotData:
    """The characters of `omniglot/`, or of a folder or zip of characters that is the root itself.

    Read are `omniglot_resized.zip` (28x28), or, where that is not there, the public
    `images_background*.zip` and `images_evaluation.zip` (105x105), each also as a folder. A path
    with "background" or "evaluation" in it says which split it belongs to; elsewhere the published
    evaluation alphabets are the test split, or everything if none of them is there.

    Args:
        root: The data root.
        size: (height, width) to resize to, by the nearest pixel as the usual 28x28 version was
            made; None keeps the images as they are.
        source: `resized` or `public`; None takes what is there, resized first.

    Raises:
        UserError: Nothing is there, a picture is damaged or of another size, or an alphabet is in
            both splits.
    """
    pictures = _pictures(root)
    names = {f"{picture.files.place.name}/{picture.name}": picture for picture in pictures}
    kinds: dict[Source, list[_Picture]] = {
        "resized": [picture for name, picture in names.items() if _RESIZED in name],
        "public": [picture for name, picture in names.items() if _RESIZED not in name],
    }
    chosen = kinds[source] if source else kinds["resized"] or kinds["public"]
    if not chosen:
        wanted = "omniglot_resized.zip" if source == "resized" else "images_background.zip"
        raise missing("omniglot", f"omniglot/{wanted}", root)
    train, test = _by_split(chosen)
    return OmniglotData(_read(train, size), _read(test, size))


def holds_characters(root: Path) -> bool:
    """Whether there is anything for `load_omniglot` to read."""
    return bool(_pictures(root))


def load_one_shot_runs(root: Path, size: tuple[int, int] = (28, 28)) -> list[Tasks]:
    """Lake's one-shot runs, `run01` to `run20`: 20-way 1-shot tasks within an alphabet.

    A run holds pictures `training/` and `test/`, and `class_labels.txt`, a line for each test
    picture: its path and that of the training picture of the same character.

    Args:
        root: The data root, whose `omniglot/` holds the runs, in a zip or unpacked, at any depth;
            or a folder or zip of runs.
        size: (height, width) to resize to.

    Returns:
        One batch of a single task for each run, in order; empty if there are no runs.

    Raises:
        UserError: A run is damaged.
    """
    runs: dict[str, Tasks] = {}
    for files in _places(root):
        present = frozenset(files.names())
        for name in sorted(present):
            if match := _RUN_LABELS.search(name):
                runs.setdefault(match[1], _one_shot_run(files, name, present, size))
    return [runs[name] for name in sorted(runs)]


def _one_shot_run(
    files: Files, labels: str, present: frozenset[str], size: tuple[int, int]
) -> Tasks:
    prefix = labels[: _RUN_LABELS.search(labels).start(1)]  # type: ignore[union-attr]
    with files.open(labels) as file:
        pairs = [
            line.split()
            for line in file.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
    where = f"{files.place}/{labels}"
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise damaged("omniglot", where, f"has {len(pair)} words in line {number}, not 2")
        for path in pair:
            if prefix + path not in present:
                raise damaged("omniglot", where, f"names {path}, which is not there")
    training = sorted({training for _, training in pairs})
    place = {name: number for number, name in enumerate(training)}

    def read(names: Iterable[str]) -> np.ndarray:
        pictures = [_resize(_decode(files, prefix + name), size) for name in names]
        return np.stack(pictures)[None, ..., None].astype(np.float32)

    return Tasks(
        support=read(training),
        support_label=np.arange(len(training), dtype=np.int32)[None],
        query=read(test for test, _ in pairs),
        query_label=np.array([[place[answer] for _, answer in pairs]], np.int32),
    )


def _places(root: Path) -> Iterator[Files]:
    """Where pictures may be: `omniglot/` and its zips, or the root itself."""
    folder = root / "omniglot" if (root / "omniglot").is_dir() else root
    archives = [root] if root.is_file() else sorted(folder.glob("*.zip"))
    for archive in archives:
        try:
            yield ZipArchive(archive)
        except zipfile.BadZipFile as error:
            problem = f"is truncated or no zip archive ({error})"
            raise damaged("omniglot", archive, problem) from error
    if folder.is_dir():
        yield Folder(folder)


def _pictures(root: Path) -> list[_Picture]:
    found = []
    for files in _places(root):
        for name in files.names():
            if match := _PICTURE.search(name):
                where = f"{files.place.name}/{name[: match.start(1)]}"
                hints = [split for split in ("background", "evaluation") if split in where]
                found.append(_Picture(files, name, hints[-1] if hints else None, *match.groups()))
    return found


def _by_split(pictures: list[_Picture]) -> tuple[list[_Picture], list[_Picture]]:
    """(training, test) pictures."""
    named = any(picture.alphabet in EVALUATION_ALPHABETS for picture in pictures)

    def is_test(picture: _Picture) -> bool:
        if picture.split is not None:
            return picture.split == "evaluation"
        return picture.alphabet in EVALUATION_ALPHABETS or not named

    splits: tuple[list[_Picture], list[_Picture]] = ([], [])
    for picture in pictures:
        splits[is_test(picture)].append(picture)
    train, test = ({picture.alphabet: picture for picture in split} for split in splits)
    for alphabet in sorted(set(train) & set(test)):
        raise UserError(
            f"the alphabet {alphabet} is in both splits, in {train[alphabet].files.place} and in "
            f"{test[alphabet].files.place}; test characters must not be seen in training: remove "
            "it from one of them."
        )
    return splits


def _read(pictures: list[_Picture], size: tuple[int, int] | None) -> Characters:
    """The characters of a split; a drawing that several archives hold counts once."""
    drawings: dict[tuple[str, str], dict[str, _Picture]] = {}
    for picture in pictures:
        same = drawings.setdefault((picture.alphabet, picture.character), {})
        same.setdefault(picture.drawing, picture)
    names, images, shape = [], [], None
    for alphabet, character in sorted(drawings):
        chosen = drawings[alphabet, character]
        stack = []
        for drawing in sorted(chosen):
            picture = chosen[drawing]
            pixels = _decode(picture.files, picture.name)
            shape = pixels.shape if shape is None else shape
            if pixels.shape != shape:
                raise damaged(
                    "omniglot",
                    f"{picture.files.place}/{picture.name}",
                    f"is {pixels.shape[0]}x{pixels.shape[1]} where the others are "
                    f"{shape[0]}x{shape[1]}",
                )
            stack.append(_resize(pixels, size))
        names.append(f"{alphabet}/{character}")
        images.append(np.stack(stack)[..., None])
    return Characters(tuple(names), tuple(images))


def _decode(files: Files, name: str) -> np.ndarray:
    """The ink of a picture, uint8 [H, W]: 1 where it was black."""
    try:
        with files.open(name) as file, Image.open(file) as image:
            return (np.asarray(image.convert("L")) < 128).astype(np.uint8)
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged("omniglot", f"{files.place}/{name}", f"is unreadable ({error})") from error


def _resize(pixels: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    if size is None or pixels.shape == tuple(size):
        return pixels
    height, width = size
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))
