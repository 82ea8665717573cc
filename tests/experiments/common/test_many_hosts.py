"""Several processes on this machine, connected over loopback, train as one does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.checkpoints import restore_newest, saved_steps
from experiments.common.cli import main
from experiments.common.hosts import HEARTBEAT_SECONDS
from experiments.common.runs import read_metrics
from tests.experiments.common import commands, small_run
from tests.experiments.common.small_tasks import TASKS

ROOT = Path(__file__).parents[3]
MINUTES = 60.0
TASK_OF = {"slow": "generative"}


def start(count, path, *arguments):
    """The processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.experiments.common.small_run", "train"]
    command += ["--run-dir", str(path), *arguments]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
    return [
        subprocess.Popen(
            [*command, "--process-id", str(number)],
            cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(count)
    ]  # fmt: skip


def outputs(processes, timeout=10 * MINUTES):
    """What each printed, all having ended."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def train_together(count, path, *arguments):
    processes = start(count, path, *arguments)
    texts = outputs(processes)
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 0, text[-3000:]
    return texts


def train_alone(path, *arguments):
    main(small_run.TASK, ["train", "--run-dir", str(path), *arguments])


def parameters(path, preset):
    """The step and the parameters of the newest checkpoint, on one device of this process."""
    template = TASKS[TASK_OF.get(preset, preset)]().state
    restored = restore_newest(path / "checkpoints", template, discard=False)
    return restored.step, [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state.params)]


def assert_equal_runs(path, other, preset, rtol):
    """Parameters and losses agree, and every logged step is there once."""
    (step, ours), (steps, theirs) = parameters(path, preset), parameters(other, preset)
    assert step == steps
    error = sum(np.sum((a - b) ** 2) for a, b in zip(ours, theirs, strict=True))
    assert np.sqrt(error) <= rtol * np.sqrt(sum(np.sum(b**2) for b in theirs))
    rows, expected = read_metrics(path), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=max(rtol, 1e-12))


def test_two_processes_train_as_one_and_their_checkpoint_is_restored_by_one(tmp_path):
    preset = "generative-classifier"
    texts = train_together(2, tmp_path / "two", "--preset", preset)
    train_alone(tmp_path / "one", "--preset", preset)
    assert_equal_runs(tmp_path / "two", tmp_path / "one", preset, rtol=1e-5)
    assert "run directory" in texts[0]
    assert "run directory" not in texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("preset", ["generative", "inverse", "adversarial-joint", "meta-classes"])
def test_every_task_trains_on_several_processes_as_on_one(tmp_path, preset, count):
    train_together(count, tmp_path / "several", "--preset", preset)
    train_alone(tmp_path / "one", "--preset", preset)
    assert_equal_runs(tmp_path / "several", tmp_path / "one", preset, rtol=1e-5)


@pytest.mark.slow
def test_parameters_spread_over_processes_train_and_are_restored_as_on_one(tmp_path):
    train_together(4, tmp_path / "several", "--preset", "generative", "--model-devices", "2")
    train_alone(tmp_path / "one", "--preset", "generative")
    assert_equal_runs(tmp_path / "several", tmp_path / "one", "generative", rtol=1e-5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    train_together(4, path, "--preset", "slow")
    return path


def wait_for_checkpoint(path, step, processes):
    deadline = time.monotonic() + 10 * MINUTES
    while step not in saved_steps(path / "checkpoints"):
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            pytest.fail(f"no checkpoint of step {step}: {outputs(processes)}")
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_one_is_killed_the_others_end_and_a_restart_ends_the_same(tmp_path, undisturbed, victim):
    path = tmp_path / "run"
    processes = start(4, path, "--preset", "slow")
    wait_for_checkpoint(path, 8, processes)
    os.kill(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    texts = outputs(processes)
    assert time.monotonic() - began < 2 * HEARTBEAT_SECONDS
    for number, (process, text) in enumerate(zip(processes, texts, strict=True)):
        assert process.returncode != 0
        if number != victim:
            # jax's own service may be the first to notice.
            assert re.search("most likely because another one did|JAX distributed service", text)
    assert max(saved_steps(path / "checkpoints")) < 20
    texts = train_together(4, path, "--resume")
    assert "continuing at step" in texts[0]
    assert_equal_runs(path, undisturbed, "slow", rtol=0.0)


@pytest.mark.slow
def test_a_checkpoint_of_four_is_continued_by_one_and_by_two(tmp_path, undisturbed):
    path = tmp_path / "run"
    processes = start(4, path, "--preset", "slow")
    wait_for_checkpoint(path, 8, processes)
    for process in processes:
        process.kill()
    outputs(processes)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(path), str(copy)], check=True)
    train_alone(path, "--resume")
    assert_equal_runs(path, undisturbed, "slow", rtol=1e-5)
    texts = train_together(2, copy, "--resume", "--model-devices", "2")  # which share one copy
    assert "continuing at step" in texts[0]
    assert_equal_runs(copy, undisturbed, "slow", rtol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_saves_and_stops_all(tmp_path, undisturbed):
    path = tmp_path / "run"
    processes = start(2, path, "--preset", "slow")
    wait_for_checkpoint(path, 4, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    texts = outputs(processes)
    assert [process.returncode for process in processes] == [130, 130], texts
    assert "it is saved" in texts[0]
    step, _ = parameters(path, "slow")
    assert 4 < step < 20
    train_together(2, path, "--resume")
    assert_equal_runs(path, undisturbed, "slow", rtol=1e-5)


@pytest.mark.slow
def test_a_mistake_is_told_by_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    processes = start(2, tmp_path / "run")
    texts = outputs(processes)
    assert [process.returncode for process in processes] == [1, 1]
    for text in texts:
        assert "is neither empty nor a run directory" in text
        assert "Traceback" not in text


def test_evaluation_in_several_processes_is_refused(tmp_path, capsys):
    arguments = ("--run-dir", tmp_path, "--distributed")
    message = commands.fail(small_run.TASK, capsys, "evaluate", *arguments)
    assert "evaluate runs in one process" in message


def test_options_that_make_no_sense_alone_are_refused(tmp_path, capsys):
    message = commands.fail(small_run.TASK, capsys, "train", "--processes", 2)
    assert "go with --coordinator" in message
    message = commands.fail(
        small_run.TASK, capsys, "train", "--run-dir", tmp_path / "run", "--model-devices", 2
    )
    assert "cannot be divided into groups of 2" in message
    assert not (tmp_path / "run").exists()
