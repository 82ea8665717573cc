"""Checkpoints as folders: a folder named by its step is whole, at every moment of a kill.

A checkpoint is written under another name, gets a list of its files with their CRC-32, and is then
renamed to its step; it is removed the other way round. The list finds later damage before anything
is decoded: some damage would decode to wrong numbers without an error.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

from experiments.common.files import write_json

_CHECKSUMS = "checksums.json"
_SAVING = "saving-"
_REMOVING = "removing-"


def saved_steps(directory: Path) -> list[int]:
    """The steps of which a checkpoint was written to its end, in ascending order."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit())


def unfinished(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return directory / f"{_SAVING}{step}"


def publish(directory: Path, step: int) -> None:
    """Make an unfinished checkpoint, to which nothing will be written any more, a valid one.

    It takes the place of an older one of the same step.
    """
    written = unfinished(directory, step)
    write_json(written / _CHECKSUMS, _checksums(written))
    if (directory / str(step)).exists():
        remove(directory, step)
    written.rename(directory / str(step))


def remove(directory: Path, step: int) -> None:
    """Delete a checkpoint."""
    doomed = directory / f"{_REMOVING}{step}"
    (directory / str(step)).rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(directory: Path) -> None:
    """Delete what killed or failed saves and removals left behind; none may be going on."""
    for entry in list(directory.iterdir()):
        if entry.name.startswith((_SAVING, _REMOVING)):
            shutil.rmtree(entry, ignore_errors=True)


def check_undamaged(folder: Path) -> None:
    """Compare a checkpoint's files with the list of their CRC-32.

    Raises:
        ValueError: A file, or the list, is missing or changed.
    """
    if not (folder / _CHECKSUMS).is_file():
        raise ValueError(f"{_CHECKSUMS} is missing")
    present = _checksums(folder)
    for name, checksum in json.loads((folder / _CHECKSUMS).read_text()).items():
        if present.get(name) != checksum:
            raise ValueError(f"{name} is missing or changed")


def _checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of every file below a checkpoint's folder, but of the list itself."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}
