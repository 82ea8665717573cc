"""The command line: commands, defaults, and one clean sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.common.cli import main
from tests.experiments.common import toy


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    main(toy.TASK, list(arguments))


def fail(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_without_a_command_it_trains_and_evaluates_in_a_new_directory(capsys):
    run()
    (path,) = Path("runs/toy").iterdir()
    assert path.name.startswith("fast-")
    summary = json.loads((path / "summary.json").read_text())
    assert summary["step"] == 40
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5, 41, 5))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert f"{summary['sum']:.4g}" in capsys.readouterr().out


def test_train_then_evaluate(capsys):
    run("train", "--run-dir", "here", "--seed", "5")
    assert not Path("here/summary.json").exists()
    run("evaluate", "--run-dir", "here")
    first = Path("here/summary.json").read_text()
    run("evaluate", "--run-dir", "here", "--preset", "fast", "--seed", "5")
    assert Path("here/summary.json").read_text() == first


def test_evaluate_and_resume_take_the_newest_run(capsys):
    run("train")
    run("evaluate")
    (path,) = Path("runs/toy").iterdir()
    assert (path / "summary.json").exists()
    run("--resume")
    assert len(list(Path("runs/toy").iterdir())) == 1


def test_resume_in_a_fresh_directory_starts_and_says_so(capsys):
    run("train", "--run-dir", "fresh", "--resume")
    assert "fresh holds no run yet" in capsys.readouterr().out


def test_mistakes_are_one_sentence(capsys):
    assert "'huge'; choose one of fast, slow" in fail(capsys, "--preset", "huge")
    assert "not between 0 and" in fail(capsys, "--seed", "-1")
    assert "holds no run" in fail(capsys, "evaluate", "--run-dir", "nowhere")
    assert "there is no run in runs/toy" in fail(capsys, "evaluate")
    assert "nothing to resume" in fail(capsys, "evaluate", "--resume")
    assert "toy has no images to export" in fail(capsys, "export")
    assert "toy builds on no other run" in fail(capsys, "--from-run", "nowhere")
    Path("file").write_text("")
    assert "cannot be written" in fail(capsys, "--run-dir", "file/run")
    assert not Path("runs").exists()
    run("train", "--run-dir", "here")
    assert "holds a trained run" in fail(capsys, "--run-dir", "here")
    assert "preset fast, not slow" in fail(capsys, "--run-dir", "here", "--preset", "slow")
    assert "seed 0, not 1" in fail(capsys, "evaluate", "--run-dir", "here", "--seed", "1")


def test_a_loss_that_is_not_finite_stops_training_with_a_message(capsys):
    message = fail(capsys, "--preset", "explosive", "--run-dir", "here")
    assert "training stopped because loss is" in message
    assert "lower the learning rate" in message
    assert "unfinished" in fail(capsys, "--run-dir", "here")


def test_help_names_commands_options_and_presets(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    options = ("--preset", "--run-dir", "--data-root", "--seed", "--resume", "--from-run")
    for word in ("train", "evaluate", "export", "fast, slow", *options):
        assert word in text
