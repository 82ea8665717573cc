"""One process at a time in a run directory: who is told what, and when it is free again."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.common.errors import UserError
from experiments.common.locks import lock
from experiments.common.runs import RunRecord, continue_run, open_run, start_run
from tests.experiments.common import toy

ROOT = Path(__file__).parents[3]

HOLD = """
import sys, time
from pathlib import Path
from experiments.common.locks import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has claimed `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def record():
    return RunRecord.new("toy", "fast", 3, toy.Settings())


def test_a_second_process_is_told_who_holds_it_until_that_one_dies(tmp_path, holder):
    message = rf"in use by process {holder.pid} on {socket.gethostname()}.*--run-dir"
    with pytest.raises(UserError, match=message):
        start_run(tmp_path, record())
    assert not (tmp_path / "config.json").exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    start_run(tmp_path, record())


def test_a_run_that_is_trained_elsewhere_is_not_continued_but_can_be_read(tmp_path, holder):
    other = tmp_path / "run"
    start_run(other, record())
    for file in other.iterdir():
        if file.name == "config.json":
            file.rename(tmp_path / file.name)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="in use by"):
        continue_run(tmp_path, "toy", preset=None, seed=None, resume=True)
    assert open_run(tmp_path, "toy").record == record()
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_lock_is_the_process_and_ends_with_the_claim(tmp_path):
    first = start_run(tmp_path / "run", record())
    again = continue_run(first.path, "toy", preset=None, seed=None, resume=True)
    part = again.part("vae")
    del first, again
    assert _is_locked(tmp_path / "run")
    del part
    assert not _is_locked(tmp_path / "run")


def _is_locked(path):
    with (path / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_file_system_without_locks_is_mentioned(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock(tmp_path)
    assert f"{tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err
