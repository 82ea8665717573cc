"""The command line that every task shares: train, evaluate, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

import jax
import tyro
from rich.table import Table

from experiments.common import hosts
from experiments.common.devices import compile_quickly, use_all_cores
from experiments.common.errors import DISK_ERRORS, UserError, reason
from experiments.common.non_finite import skip_non_finite
from experiments.common.parallel import make_mesh, use_mesh
from experiments.common.runs import (
    RunDirectory,
    RunRecord,
    check_writable,
    continue_run,
    holds_run,
    is_trained,
    new_directory,
    newest_run,
    open_run,
    start_run,
)
from experiments.common.terminal import console, error_console, say
from experiments.common.training import TrainingInterruptedError

C = TypeVar("C")
Summary = dict[str, float | int | str]

_RUNS = Path("runs")
_STATUS_ERROR = 1
_STATUS_INTERRUPTED = 130
_OF_TRAINED = ("evaluate", "export")  # commands that never train
_SMOKE = "smoke"  # the preset of every task that shows that all works, and mostly compiles


@dataclass(frozen=True)
class Arguments:
    """Arguments of every task.

    Attributes:
        command: `train`, `evaluate`, nothing for both, or `export` (tasks that make images) to
            write a run's images as png files.
        preset: Name of the settings. Default: the task's smallest real preset, or that of the run
            directory.
        run_dir: Directory of the run. Default: a new one in runs/TASK/, or with --resume and
            evaluate the newest one there.
        data_root: Folder that holds mnist/, cifar10/, omniglot/, celeba/, orl_faces/. Default:
            JDEQ_DATA, or the user's cache.
        seed: Seed of parameters and data order, from 0 to 2**32 - 1. Default: 0, or that of the
            run directory.
        resume: Continue the unfinished run in the run directory.
        skip_non_finite: Leave out training steps whose loss or state is not finite, and count them
            as skipped_steps in the metrics. Default: training stops at the first and saves what it
            was given in non_finite/ of the run directory.
        from_run: Directory of a trained run of the task that this one builds on, to take its models
            from (inverse: a generative run). Default: they are trained first.
        model_devices: Devices that share one copy of the parameters and of the optimiser's state,
            for models that do not fit on one; it divides their number. Images are spread over all
            copies.
        distributed: This is one of several processes that train together, started by Slurm, Open
            MPI, Kubernetes or on each host of a TPU slice, where jax finds the others.
        coordinator: Elsewhere: where process 0 listens to the others.
        processes: Elsewhere: how many there are.
        process_id: Elsewhere: which one this is, from 0.
    """

    command: Annotated[Literal["both", "train", "evaluate", "export"], tyro.conf.Positional] = (
        "both"
    )
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    data_root: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    skip_non_finite: tyro.conf.FlagCreatePairsOff[bool] = False
    from_run: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    model_devices: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    process_id: Annotated[int | None, tyro.conf.arg(metavar="I")] = None


@dataclass(frozen=True)
class Task(Generic[C]):
    """A task of `python -m experiments.<name>`.

    Attributes:
        name: Name of the package.
        description: What `--help` says first.
        presets: Name to settings, a dataclass with at least `steps`.
        default: The preset that is taken if none is named.
        train: `train(settings, run, data_root)` trains to the end, from a checkpoint if there is
            one.
        evaluate: `evaluate(settings, run, data_root)` measures, draws and returns the results.
        export: `export(settings, run, data_root)` writes images, where the task makes any.
        adopt: `adopt(settings, run, source)` copies what a new run needs from the run in the
            directory `source`, where the task builds on another.
        arguments: The command line, where the task has options of its own.
        adjust: `adjust(settings, arguments)` is what the evaluation works with, given them.
    """

    name: str
    description: str
    presets: Mapping[str, C]
    default: str
    train: Callable[[C, RunDirectory, Path | None], None]
    evaluate: Callable[[C, RunDirectory, Path | None], Summary]
    export: Callable[[C, RunDirectory, Path | None], None] | None = None
    adopt: Callable[[C, RunDirectory, Path], None] | None = None
    arguments: type[Arguments] = Arguments
    adjust: Callable[[C, Any], C] | None = None


def main(task: Task[Any], argv: Sequence[str] | None = None) -> None:
    """Run a task's command line; mistakes of the user end with one sentence and status 1."""
    arguments = tyro.cli(
        task.arguments,
        prog=f"python -m experiments.{task.name}",
        description=f"{task.description}\n\nPresets: {', '.join(task.presets)} "
        f"(default: {task.default}).",
        args=argv,
    )
    try:
        _run(task, arguments)
    except Exception as error:
        if hosts.count() == 1:
            raise
        hosts.end_after(error)


def _run(task: Task[Any], arguments: Arguments) -> None:
    run: RunDirectory | None = None
    try:
        if arguments.preset == _SMOKE:
            compile_quickly()
        _join(arguments)
        mesh = make_mesh(arguments.model_devices)  # refuses before a directory is claimed
        run = _open(task, arguments)
        with skip_non_finite(arguments.skip_non_finite), use_mesh(mesh):
            _execute(task, arguments, run)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if run is None or error.errno not in DISK_ERRORS:
            raise
        place = error.filename or run.path
        _fail(
            f"{place} cannot be written or read ({reason(error)}); repair that, and continue with "
            f"`{_continuation(task, arguments, run)}`."
        )
    except (TrainingInterruptedError, KeyboardInterrupt) as stop:
        say(str(stop) or "stopped at once")
        if run is not None:
            say(f"continue with `{_continuation(task, arguments, run)}`")
        hosts.end(_STATUS_INTERRUPTED)


def _fail(message: str) -> NoReturn:
    error_console.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    hosts.end(_STATUS_ERROR)


def _join(arguments: Arguments) -> None:
    """Join the other processes; if there are none, take all cores."""
    if not arguments.distributed and arguments.coordinator is None:
        if arguments.processes is not None or arguments.process_id is not None:
            raise UserError("--processes and --process-id go with --coordinator HOST:PORT.")
        use_all_cores()
        return
    if arguments.command in _OF_TRAINED:
        raise UserError(
            f"{arguments.command} runs in one process: start it once, without --distributed and "
            "--coordinator."
        )
    hosts.join(arguments.coordinator, arguments.processes, arguments.process_id)


def _open(task: Task[Any], arguments: Arguments) -> RunDirectory:
    """The run directory that process 0 claims, for all processes."""
    if hosts.is_first():
        claimed: list[RunDirectory] = []

        def claim() -> str:
            claimed.append(_claim(task, arguments))
            return str(claimed[0].path.absolute())

        hosts.from_first(claim)
        return claimed[0]
    path = Path(hosts.from_first(str))
    if not holds_run(path):
        raise UserError(
            f"process {jax.process_index()} does not see {path}, which process 0 claimed; name a "
            "directory on a file system that all hosts share with --run-dir."
        )
    return open_run(path, task.name)


def _continuation(task: Task[Any], arguments: Arguments, run: RunDirectory) -> str:
    resume = "" if arguments.command in _OF_TRAINED else " --resume"
    return _command(task, arguments.command, arguments, run) + resume


def _command(task: Task[Any], command: str, arguments: Arguments, run: RunDirectory) -> str:
    words = "" if command == "both" else f" {command}"
    data = f" --data-root {arguments.data_root}" if arguments.data_root is not None else ""
    return f"python -m experiments.{task.name}{words} --run-dir {run.path}{data}"


def show_summary(summary: Summary, title: str) -> None:
    """Print results as a table."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def _claim(task: Task[Any], arguments: Arguments) -> RunDirectory:
    """The run directory that the arguments name, checked before anything is computed."""
    if arguments.preset is not None and arguments.preset not in task.presets:
        raise UserError(
            f"unknown preset {arguments.preset!r}; choose one of {', '.join(task.presets)}."
        )
    if arguments.seed is not None and not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed} is not between 0 and 2**32 - 1.")
    if arguments.command == "export" and task.export is None:
        raise UserError(f"{task.name} has no images to export.")
    if arguments.from_run is not None and task.adopt is None:
        raise UserError(f"{task.name} builds on no other run; leave --from-run away.")
    if arguments.command in _OF_TRAINED:
        if arguments.resume:
            raise UserError(f"{arguments.command} has nothing to resume; leave --resume away.")
        if arguments.from_run is not None:
            raise UserError(f"{arguments.command} takes a run as it is; leave --from-run away.")
        run = open_run(
            _existing(task, arguments), task.name, preset=arguments.preset, seed=arguments.seed
        )
        check_writable(run.path)  # before minutes of evaluation, not after
        return run
    if arguments.run_dir is not None:
        path = arguments.run_dir
    elif arguments.resume:
        path = _existing(task, arguments)
    else:
        preset = arguments.preset or task.default
        path = new_directory(_RUNS / task.name, preset)
    if holds_run(path):
        if arguments.from_run is not None:
            raise UserError(f"{path} holds a run with models already; leave --from-run away.")
        return continue_run(
            path, task.name, preset=arguments.preset, seed=arguments.seed, resume=arguments.resume
        )
    if arguments.resume:
        say(f"{path} holds no run yet: starting at step 0.")
    preset = arguments.preset or task.default
    settings = task.presets[preset]
    record = RunRecord.new(task.name, preset, arguments.seed or 0, settings)

    def adopt(run: RunDirectory) -> None:
        if arguments.from_run is not None and task.adopt is not None:
            task.adopt(settings, run, arguments.from_run)

    return start_run(path, record, adopt)


def _existing(task: Task[Any], arguments: Arguments) -> Path:
    return arguments.run_dir or newest_run(_RUNS / task.name, task.name, arguments.preset)


def _execute(task: Task[Any], arguments: Arguments, run: RunDirectory) -> None:
    record = run.record
    settings = record.settings_as(type(task.presets[task.default]))
    say(f"{task.name}, preset {record.preset}, seed {record.seed}, run directory {run.path}")
    if arguments.command == "export":
        assert task.export is not None  # checked before the run directory was claimed
        task.export(settings, run, arguments.data_root)
        return
    # Before hours of training, not after.
    adjusted = settings if task.adjust is None else task.adjust(settings, arguments)
    if arguments.command != "evaluate":
        if not is_trained(run) and hosts.is_first():
            run.discard_summary()
        task.train(settings, run, arguments.data_root)
    if arguments.command != "train" and hosts.count() > 1:
        command = _command(task, "evaluate", arguments, run)
        say(f"trained; evaluate in one process, with `{command}`")
    elif arguments.command != "train":
        summary = task.evaluate(adjusted, run, arguments.data_root)
        run.write_summary(summary)
        show_summary(summary, f"{task.name}, {record.preset}")
        say(f"figures and summary.json are in {run.path}")
