"""Run directories: what a run is, what it measured, and which directory may be used for it.

config.json      task, preset, seed, settings and versions; written once, at the start
metrics.jsonl    one object a logged step
tensorboard/     the same numbers as TensorBoard events
checkpoints/     see `checkpoints`
figures/         *.png
non_finite/      what training steps that were not finite were given, see `non_finite`
summary.json     the results, flat: name to number or string; written by the evaluation
.lock            locked by the process that trains in the directory
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from experiments.common.checkpoint_files import saved_steps
from experiments.common.errors import UserError, reason
from experiments.common.files import write_json
from experiments.common.locks import LOCK, DirectoryLock, lock
from experiments.common.metrics_log import read_metrics

__all__ = [
    "RunDirectory",
    "RunRecord",
    "check_writable",
    "continue_run",
    "holds_run",
    "is_trained",
    "new_directory",
    "newest_run",
    "open_run",
    "read_metrics",
    "start_run",
]

_CONFIG = "config.json"
_SUMMARY = "summary.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

C = TypeVar("C")


@dataclass(frozen=True)
class RunRecord:
    """What `config.json` holds.

    Attributes:
        task: `generative`, `adversarial`, ...
        preset: Name of the settings.
        seed: Seed of parameters, data order and everything random.
        settings: The preset's fields.
        versions: Versions of Python and of the packages that matter.
        number: Place in the order in which the runs beside it were started, from 1, which no clock
            decides; 0 in runs of older versions.
    """

    task: str
    preset: str
    seed: int
    settings: dict[str, Any]
    versions: dict[str, str]
    number: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def new(cls, task: str, preset: str, seed: int, settings: Any) -> RunRecord:
        """The record of a run that starts now; `settings` is a dataclass."""
        versions = {"python": platform.python_version()}
        versions |= {package: metadata.version(package) for package in _PACKAGES}
        return cls(task, preset, seed, dataclasses.asdict(settings), versions)

    def settings_as(self, kind: type[C]) -> C:
        """The settings as the task's dataclass.

        Raises:
            UserError: They were written by a version of the task with other settings.
        """
        hints = typing.get_type_hints(kind)
        if set(self.settings) != set(hints):
            different = ", ".join(sorted(set(self.settings) ^ set(hints)))
            raise UserError(
                f"this run was written by another version of {self.task}, whose settings differ "
                f"in {different}; use that version, or start a new run."
            )
        return kind(**self.settings)


class RunDirectory:
    """A directory that belongs to one run.

    Attributes:
        path: The directory.
        record: What its `config.json` says.
    """

    def __init__(self, path: Path, record: RunRecord, held: DirectoryLock | None = None):
        self.path = path
        self.record = record
        self._held = held  # a claimed directory is locked as long as this object lives

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Folder of the figures, made when first asked for."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def part(self, name: str) -> RunDirectory:
        """The folder of a further model of this run, with checkpoints and metrics of its own."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return RunDirectory(folder, self.record, self._held)

    def write_summary(self, summary: dict[str, float | int | str]) -> None:
        """Write the results; a number may be infinite."""
        write_json(self.path / _SUMMARY, summary)

    def discard_summary(self) -> None:
        """Remove results that further training makes stale."""
        (self.path / _SUMMARY).unlink(missing_ok=True)


def holds_run(path: Path) -> bool:
    """Whether a run was started in this directory."""
    return (path / _CONFIG).is_file()


def new_directory(parent: Path, preset: str) -> Path:
    """A new, empty directory whose name says the preset and the time."""
    name = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, attempt = parent / name, 1
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # of the same second, or of one that the clock had twice
            attempt += 1
            path = parent / f"{name}-{attempt}"
        except OSError as error:
            raise _not_writable(path, error) from error
        else:
            return path


def start_run(
    path: Path, record: RunRecord, prepare: Callable[[RunDirectory], None] | None = None
) -> RunDirectory:
    """Claim a directory for a new run; it is made if it does not exist.

    It is this process's alone as long as the returned object lives.

    Args:
        path: The directory.
        record: What its `config.json` will say.
        prepare: Puts into the directory what the run starts from; until it is done, the directory
            holds no run.

    Raises:
        UserError: The directory is not empty, is in use, or cannot be written.
    """
    _check_empty(path)
    check_writable(path)
    held = lock(path)
    _check_empty(path)  # another process may have been quicker
    number = 1 + max((run.record.number for run in _runs_in(path.parent)), default=0)
    record = dataclasses.replace(record, number=number)
    run = RunDirectory(path, record, held)
    if prepare is not None:
        prepare(run)
    write_json(path / _CONFIG, dataclasses.asdict(record))
    return run


def continue_run(
    path: Path, task: str, *, preset: str | None, seed: int | None, resume: bool
) -> RunDirectory:
    """The run in a directory, to be trained further; its own settings count.

    Args:
        path: The directory.
        task: The task whose run it must be.
        preset: The preset it must be of, or None for any.
        seed: The seed it must have, or None for any.
        resume: Whether the user asked to continue.

    Raises:
        UserError: It is another run, `resume` is not set, or the directory is in use or cannot be
            written.
    """
    run = open_run(path, task, preset=preset, seed=seed)
    if not resume:
        raise UserError(_occupied(run))
    check_writable(path)
    return RunDirectory(path, run.record, lock(path))


def open_run(
    path: Path, task: str, *, preset: str | None = None, seed: int | None = None
) -> RunDirectory:
    """The run in a directory, whether finished or not.

    Args:
        path: The directory.
        task: The task whose run it must be.
        preset: The preset it must be of, or None for any.
        seed: The seed it must have, or None for any.

    Raises:
        UserError: There is none, or it is another one, or its `config.json` is damaged.
    """
    config = path / _CONFIG
    if not config.is_file():
        raise UserError(f"{path} holds no run: {config} does not exist.")
    try:
        record = RunRecord(**json.loads(config.read_text()))
        settings = {name: _tuples(value) for name, value in record.settings.items()}
        record = dataclasses.replace(record, settings=settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{config} is damaged ({error}); restore it, or start a new run elsewhere."
        ) from error
    for name, wanted in (("task", task), ("preset", preset), ("seed", seed)):
        have = getattr(record, name)
        if wanted is not None and have != wanted:
            raise UserError(
                f"{path} holds a run of {name} {have}, not {wanted}; name another directory with "
                "--run-dir."
            )
    return RunDirectory(path, record)


def newest_run(parent: Path, task: str, preset: str | None) -> Path:
    """The last started run of a task, of this preset if one is named.

    Raises:
        UserError: There is none.
    """
    runs = [run for run in _runs_in(parent) if preset in (None, run.record.preset)]
    if runs:
        return open_run(max(runs, key=_order).path, task).path
    which = f"run of preset {preset}" if preset else "run"
    raise UserError(f"there is no {which} in {parent}; name a directory with --run-dir.")


def is_trained(run: RunDirectory) -> bool:
    """Whether training came to its end: the checkpoint of the last step exists."""
    return max(saved_steps(run.checkpoints), default=0) >= run.record.settings["steps"]


def _occupied(found: RunDirectory) -> str:
    path, task = found.path, found.record.task
    if is_trained(found):
        return (
            f"{path} holds a trained run; choose another directory with --run-dir, or evaluate "
            f"it with `python -m experiments.{task} evaluate --run-dir {path}`."
        )
    return (
        f"{path} holds an unfinished run; continue it with --resume, or choose another directory "
        "with --run-dir."
    )


def _order(run: RunDirectory) -> tuple[int, float]:
    # The clock decides among runs of older versions, and among those started at the same time.
    return run.record.number, (run.path / _CONFIG).stat().st_mtime


def _runs_in(parent: Path) -> Iterator[RunDirectory]:
    for config in parent.glob(f"*/{_CONFIG}"):
        with contextlib.suppress(ValueError, TypeError, OSError):  # damaged: none to count on
            yield RunDirectory(config.parent, RunRecord(**json.loads(config.read_text())))


def _check_empty(path: Path) -> None:
    # A start that was killed may have left the half of a file.
    if path.is_dir() and any(
        entry.name != LOCK and not entry.name.endswith(".tmp") for entry in path.iterdir()
    ):
        raise UserError(
            f"{path} is neither empty nor a run directory; choose another one with --run-dir."
        )


def check_writable(path: Path) -> None:
    """Try to write into a directory, which is made if it does not exist.

    Raises:
        UserError: It cannot be written.
    """
    probe = path / ".probe.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({reason(error)}); choose another directory with --run-dir."
    )


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
