"""`python -m experiments.common.data download mnist` fetches a public data set."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.common.data.download import download
from experiments.common.errors import UserError
from experiments.common.terminal import error_console, say


@dataclass(frozen=True)
class Arguments:
    """Fetch a public data set, checksummed; a broken transfer is continued.

    Attributes:
        command: What to do.
        name: mnist, cifar10, omniglot, faces or celeba.
        data_root: Folder that holds mnist/, cifar10/, ...; JDEQ_DATA or the user's cache if not
            given.
    """

    command: Annotated[Literal["download"], tyro.conf.Positional]
    name: Annotated[str, tyro.conf.Positional]
    data_root: Path | None = None


def main() -> None:
    """Entry point of the command."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.common.data")
    try:
        say(f"{arguments.name} is in {download(arguments.name, arguments.data_root)}")
    except UserError as error:
        error_console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
