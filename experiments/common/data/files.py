"""Files of a folder or of a zip archive, under one interface."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path
from typing import IO, Protocol


class Files(Protocol):
    """Named files that can be opened for reading."""

    @property
    def place(self) -> Path:
        """The folder or archive."""

    def names(self) -> list[str]:
        """All files' names relative to the place, with forward slashes, sorted."""

    def open(self, name: str) -> IO[bytes]:
        """One file, seekable."""


class Folder:
    """The files below a folder."""

    def __init__(self, place: Path):
        self.place = place

    def names(self) -> list[str]:
        """All files' names relative to the folder, with forward slashes, sorted."""
        paths = self.place.rglob("*")
        return sorted(path.relative_to(self.place).as_posix() for path in paths if path.is_file())

    def open(self, name: str) -> IO[bytes]:
        """One file, seekable."""
        return (self.place / name).open("rb")


class ZipArchive:
    """The files of a zip archive, read without unpacking it.

    Raises:
        zipfile.BadZipFile: The file is no zip archive, or a truncated one.
    """

    def __init__(self, place: Path):
        self.place = place
        self._local = threading.local()
        self._names = sorted(n for n in self._archive().namelist() if not n.endswith("/"))

    def _archive(self) -> zipfile.ZipFile:
        # One handle per thread: a shared one would make readers wait for each other.
        if not hasattr(self._local, "archive"):
            self._local.archive = zipfile.ZipFile(self.place)
        return self._local.archive

    def names(self) -> list[str]:
        """All files' names in the archive, with forward slashes, sorted."""
        return self._names

    def open(self, name: str) -> IO[bytes]:
        """One file, seekable."""
        return self._archive().open(name)
