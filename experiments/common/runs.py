"""Run directories: what a run is, what it measured, and which directory may be used for it.

config.json      task, preset, seed, settings and versions; written once, at the start
metrics.jsonl    one object a logged step
tensorboard/     the same numbers as TensorBoard events
checkpoints/     see `checkpoints`
figures/         *.png
summary.json     the results, flat: name to number or string; written by the evaluation
"""

from __future__ import annotations

import dataclasses
import json
import platform
import typing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from tensorboardX import SummaryWriter

from experiments.common.checkpoints import saved_steps
from experiments.common.errors import UserError
from experiments.common.files import to_json, write_atomically, write_json

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
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
    """

    task: str
    preset: str
    seed: int
    settings: dict[str, Any]
    versions: dict[str, str]

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

    def __init__(self, path: Path, record: RunRecord):
        self.path = path
        self.record = record

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
        return RunDirectory(folder, self.record)

    def write_summary(self, summary: dict[str, float | int | str]) -> None:
        """Write the results; a number may be infinite."""
        write_json(self.path / _SUMMARY, summary)

    def discard_summary(self) -> None:
        """Remove results that further training makes stale."""
        (self.path / _SUMMARY).unlink(missing_ok=True)


def holds_run(path: Path) -> bool:
    """Whether a run was started in this directory."""
    return (path / _CONFIG).is_file()


def start_run(path: Path, record: RunRecord) -> RunDirectory:
    """Claim a directory for a new run; it is made if it does not exist.

    Raises:
        UserError: The directory is not empty, or cannot be written.
    """
    # A start that was killed may have left the half of a file.
    if path.is_dir() and any(not entry.name.endswith(".tmp") for entry in path.iterdir()):
        raise UserError(
            f"{path} is neither empty nor a run directory; choose another one with --run-dir."
        )
    _check_writable(path)
    write_json(path / _CONFIG, dataclasses.asdict(record))
    return RunDirectory(path, record)


def abandon_run(run: RunDirectory) -> None:
    """Give up a directory that was claimed, but in which nothing was done yet."""
    (run.path / _CONFIG).unlink()


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
        UserError: It is another run, `resume` is not set, or the directory cannot be written.
    """
    run = open_run(path, task, preset=preset, seed=seed)
    if not resume:
        raise UserError(_occupied(run))
    _check_writable(path)
    return run


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
    """The most recently started run of a task, of this preset if one is named.

    Raises:
        UserError: There is none.
    """
    configs = sorted(parent.glob(f"*/{_CONFIG}"), key=lambda config: config.stat().st_mtime)
    for config in reversed(configs):
        run = open_run(config.parent, task)
        if preset in (None, run.record.preset):
            return run.path
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


def _check_writable(path: Path) -> None:
    probe = path / ".probe.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); choose another directory with --run-dir."
        ) from error


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard.

    What an interrupted run logged after its checkpoint is dropped first, so that a resumed run's
    file reads as if nothing had happened: every logged step once.

    Args:
        run: The run directory.
        step: The step training starts from: 0, or that of the checkpoint.
    """

    def __init__(self, run: RunDirectory, step: int):
        self._path = run.path / _METRICS
        kept = [row for row in read_metrics(run.path) if row["step"] <= step]
        text = "".join(to_json(row) + "\n" for row in kept)
        write_atomically(self._path, text.encode())
        self._file = self._path.open("a")
        self._events = SummaryWriter(
            str(run.path / "tensorboard"), purge_step=step + 1, filename_suffix=f".from{step}"
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log one row."""
        self._file.write(to_json({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run directory's `metrics.jsonl`; a last line cut off by a crash is left out."""
    file = path / _METRICS
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
