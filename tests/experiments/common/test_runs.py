"""Run directories: what is refused, what is kept, and that nothing is half-written."""

from __future__ import annotations

import json
import math
import os

import pytest

from experiments.common.errors import UserError
from experiments.common.files import to_json, write_atomically
from experiments.common.runs import (
    MetricsLog,
    RunRecord,
    continue_run,
    newest_run,
    open_run,
    read_metrics,
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


def test_a_damaged_or_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        open_run(tmp_path, "toy")
    (tmp_path / "config.json").write_text('{"task": ')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        open_run(tmp_path, "toy")


def test_the_newest_run_of_a_preset_is_found(tmp_path, record):
    for number, preset in enumerate(("fast", "slow", "fast", "slow")):
        path = tmp_path / str(number)
        start_run(path, RunRecord("toy", preset, 0, record.settings, {}))
        os.utime(path / "config.json", (number, number))
    assert newest_run(tmp_path, "toy", None).name == "3"
    assert newest_run(tmp_path, "toy", "fast").name == "2"
    with pytest.raises(UserError, match="no run of preset other"):
        newest_run(tmp_path, "toy", "other")


def test_metrics_after_resuming_have_no_gap_and_no_repeat(tmp_path, record):
    run = start_run(tmp_path, record)
    log = MetricsLog(run, 0)
    for step in (5, 10, 15, 20):
        log.write(step, {"loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')  # killed while writing
    log = MetricsLog(run, 10)
    for step in (15, 20, 25):
        log.write(step, {"loss": 2 / step})
    log.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25]
    assert rows[1]["loss"] == 1 / 10
    assert rows[2]["loss"] == 2 / 15
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 2


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
