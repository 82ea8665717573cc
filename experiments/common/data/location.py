"""Where data is looked for, and what to say when it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pooch

from experiments.common.errors import UserError

ENVIRONMENT_VARIABLE = "JDEQ_DATA"


def data_root(option: str | Path | None = None) -> Path:
    """The data folder: the option if given, else `JDEQ_DATA`, else the user's cache."""
    return Path(option or os.environ.get(ENVIRONMENT_VARIABLE) or pooch.os_cache("jdeq"))


def missing(name: str, wanted: str, root: Path) -> UserError:
    """The error for a file that is not there.

    Args:
        name: The data set, as the download command knows it.
        wanted: What is missing, relative to the data root.
        root: The data root that was looked in.
    """
    return UserError(
        f"{wanted} was not found in {root}; put it there, name another folder with --data-root "
        f"or {ENVIRONMENT_VARIABLE}, or run `{_download_command(name, root)}`."
    )


def damaged(name: str, path: Path | str, problem: str) -> UserError:
    """The error for a file that is there but cannot be used.

    Args:
        name: The data set, as the download command knows it.
        path: The file.
        problem: What is wrong with it: "ends after 12 of 784 bytes".
    """
    return UserError(
        f"{path} cannot be used: it {problem}; replace the file, or delete it and run "
        f"`python -m experiments.common.data download {name}`."
    )


def _download_command(name: str, root: Path) -> str:
    """The command that fetches a data set into this root."""
    option = "" if root == data_root() else f" --data-root {root}"
    return f"python -m experiments.common.data download {name}{option}"
