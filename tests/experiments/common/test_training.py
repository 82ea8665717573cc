"""The loop: interrupted by Ctrl-C, by SIGTERM and by SIGKILL, it ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.checkpoints import restore_newest
from experiments.common.cli import main
from experiments.common.runs import read_metrics
from tests.experiments.common import toy

ROOT = Path(__file__).parents[3]


def train(*arguments):
    main(toy.TASK, ["train", *map(str, arguments)])


def start(*arguments):
    """The same in a process of its own, which can be killed."""
    command = [sys.executable, "-m", "tests.experiments.common.toy", "train"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_rows(path, count):
    deadline = time.monotonic() + 60
    while len(read_metrics(path)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def final_state(path):
    restored = restore_newest(path / "checkpoints", toy.initial(toy.Settings(), 0), discard=False)
    assert restored.step == 40
    key = jax.random.key_data(restored.state.key)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state._replace(key=key))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    train("--preset", "slow", "--run-dir", path)
    return path


def assert_as_undisturbed(path, undisturbed):
    for one, other in zip(final_state(path), final_state(undisturbed), strict=True):
        np.testing.assert_array_equal(one, other)
    rows, expected = read_metrics(path), read_metrics(undisturbed)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]


@pytest.mark.parametrize("rows", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_and_resumed_it_ends_bit_for_bit_the_same(tmp_path, undisturbed, rows):
    path = tmp_path / "run"
    process = start("--preset", "slow", "--run-dir", path)
    wait_for_rows(path, rows)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train("--resume", "--run-dir", path)
    assert_as_undisturbed(path, undisturbed)
    losses = [row["loss"] for row in read_metrics(path)]
    assert losses == [row["loss"] for row in read_metrics(undisturbed)]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, undisturbed, capsys, number):
    path = tmp_path / "run"
    process = start("--preset", "slow", "--run-dir", path)
    wait_for_rows(path, 2)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert f"experiments.toy train --run-dir {path} --resume" in output
    train("--resume", "--run-dir", path)
    assert "continuing at step" in capsys.readouterr().out
    assert_as_undisturbed(path, undisturbed)
