"""Run directories: what is refused, what is kept, and that nothing is half-written."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from experiments.common.errors import UserError
from experiments.common.files import to_json, write_atomically
from experiments.common.runs import (
    RunRecord,
    check_writable,
    continue_run,
    holds_run,
    new_directory,
    newest_run,
    open_run,
    start_run,
)
from tests.experiments.common import toy


@pytest.fixture
def record():
    return RunRecord.new("toy", "fast", 3, toy.Settings())


def test_a_new_run_can_be_opened_with_its_settings(tmp_path, record):
    start_run(tmp_path / "a" / "b", record)
    run = open_run(tmp_path / "a" / "b", "toy")
    assert run.record == record
    assert run.record.settings_as(toy.Settings) == toy.Settings()
    assert "jax" in run.record.versions


def test_settings_of_another_version_are_refused(record):
    old = RunRecord("toy", "fast", 0, {**record.settings, "momentum": 0.9}, {})
    with pytest.raises(UserError, match="momentum"):
        old.settings_as(toy.Settings)


def test_an_unfinished_run_is_refused_without_resume(tmp_path, record):
    start_run(tmp_path / "run", record)
    with pytest.raises(UserError, match=r"unfinished.*--resume"):
        continue_run(tmp_path / "run", "toy", preset="fast", seed=None, resume=False)
    run = continue_run(tmp_path / "run", "toy", preset="fast", seed=None, resume=True)
    assert run.record == record


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_of_another_preset_seed_or_task_is_refused(tmp_path, record, resume):
    path = tmp_path / "run"
    start_run(path, record)
    with pytest.raises(UserError, match="preset fast, not slow"):
        continue_run(path, "toy", preset="slow", seed=None, resume=resume)
    with pytest.raises(UserError, match="seed 3, not 4"):
        continue_run(path, "toy", preset=None, seed=4, resume=resume)
    with pytest.raises(UserError, match="task toy, not generative"):
        continue_run(path, "generative", preset=None, seed=None, resume=resume)


def test_a_trained_run_is_refused_with_the_command_that_evaluates_it(tmp_path, record):
    run = start_run(tmp_path / "run", record)
    (run.checkpoints / "40").mkdir(parents=True)
    with pytest.raises(UserError, match=r"experiments\.toy evaluate --run-dir"):
        continue_run(run.path, "toy", preset=None, seed=None, resume=False)


def test_directories_that_hold_something_else_or_cannot_be_written_are_refused(tmp_path, record):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    with pytest.raises(UserError, match="neither empty nor a run"):
        start_run(tmp_path / "thesis", record)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be written"):
            start_run(path, record)
    assert (tmp_path / "file").read_text() == ""


def test_a_start_killed_before_its_first_file_can_be_repeated(tmp_path, record):
    (tmp_path / ".config.json.tmp").write_text('{"task": "to')
    assert start_run(tmp_path, record).record == record


def test_a_run_is_none_until_what_it_starts_from_is_there(tmp_path, record):
    def interrupted(run):
        (run.path / "generator").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_run(tmp_path, record, interrupted)
    assert not holds_run(tmp_path)
    with pytest.raises(UserError, match="neither empty nor a run"):
        start_run(tmp_path, record)


def test_a_damaged_or_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        open_run(tmp_path, "toy")
    (tmp_path / "config.json").write_text('{"task": ')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        open_run(tmp_path, "toy")


def start_four(parent, record):
    """Runs 0 to 3 of alternating presets, started in this order while the clock ran backwards."""
    for number, preset in enumerate(("fast", "slow", "fast", "slow")):
        path = parent / str(number)
        start_run(path, RunRecord("toy", preset, 0, record.settings, {}))
        os.utime(path / "config.json", (9 - number, 9 - number))


def test_the_newest_run_of_a_preset_is_found_whatever_the_clock_did(tmp_path, record):
    start_four(tmp_path, record)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"task": ')
    assert newest_run(tmp_path, "toy", None).name == "3"
    assert newest_run(tmp_path, "toy", "fast").name == "2"
    with pytest.raises(UserError, match="no run of preset other"):
        newest_run(tmp_path, "toy", "other")


def test_runs_of_versions_that_did_not_count_are_older(tmp_path, record):
    start_four(tmp_path, record)
    for number in (1, 2, 3):
        config = tmp_path / str(number) / "config.json"
        content = json.loads(config.read_text())
        del content["number"]
        config.write_text(json.dumps(content))
        os.utime(config, (20 + number, 20 + number))
    assert newest_run(tmp_path, "toy", None).name == "0"
    (tmp_path / "0" / "config.json").unlink()
    assert newest_run(tmp_path, "toy", None).name == "3"


def test_new_directories_differ_though_the_clock_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20300101-000000")
    names = [new_directory(tmp_path / "runs", "fast").name for _ in range(3)]
    assert names == [f"fast-20300101-000000{end}" for end in ("", "-2", "-3")]


@pytest.fixture
def read_only():
    """A run directory that this process may read, but not write."""
    if os.geteuid() != 0:
        pytest.skip("giving a directory away takes root")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    start_run(folder / "run", RunRecord.new("toy", "fast", 3, toy.Settings()))
    folder.chmod(0o755)
    os.seteuid(65534)
    yield folder
    os.seteuid(0)
    shutil.rmtree(folder)


def test_a_read_only_directory_is_refused_before_anything_is_done(read_only, record):
    path = read_only / "run"
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert open_run(path, "toy").record == record
    refused = [
        lambda: continue_run(path, "toy", preset=None, seed=None, resume=True),
        lambda: check_writable(path),
        lambda: start_run(read_only / "new", record),
        lambda: new_directory(read_only, "fast"),
    ]
    for action in refused:
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\).*--run-dir"):
            action()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_json_is_standard_and_keeps_infinities(tmp_path, record):
    text = to_json({"a": math.inf, "b": [-math.inf, math.nan], "c": "1e999 Infinity"})
    assert "Infinity," not in text
    assert json.loads(text) == {"a": math.inf, "b": [-math.inf, None], "c": "1e999 Infinity"}
    run = start_run(tmp_path, record)
    run.write_summary({"speedup": math.inf, "steps": 3, "device": "cpu"})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"speedup": math.inf, "steps": 3, "device": "cpu"}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
