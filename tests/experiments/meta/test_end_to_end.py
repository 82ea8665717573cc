"""The task's command line: trained, evaluated on other data, refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest

from experiments.common.runs import read_metrics
from experiments.meta import train
from experiments.meta.__main__ import TASK
from experiments.meta.config import PRESETS
from tests.experiments.common import commands
from tests.experiments.common.data.test_omniglot import drawings, write_folder, write_zip

SPEED = ("seconds_step_joint", "seconds_step_nested", "speedup_nested", "gradient_error_kkt")


run, fail = partial(commands.run, TASK), partial(commands.fail, TASK)


@pytest.mark.slow
def test_the_smoke_preset_leaves_a_complete_run(tmp_path):
    path = tmp_path / "smoke"
    run("--preset", "smoke", "--run-dir", path)
    summary = json.loads((path / "summary.json").read_text())
    accuracies = [
        f"{prefix}accuracy_{setting}{suffix}"
        for prefix in ("", "maml_", "imaml_", "proto_", "pixels_")
        for setting in ("5w1s", "5w5s", "20w1s", "20w5s")
        for suffix in ("", "_ci95")
    ]
    for name in (*accuracies, *SPEED):
        assert isinstance(summary[name], int | float), name
        assert not math.isnan(summary[name]), name
    assert all(isinstance(value, int | float | str) for value in summary.values())
    assert summary["gradient_error_kkt"] < 1e-2
    assert summary["gradient_error_kkt_float64"] < 1e-5
    assert summary["test_tasks"] >= 600
    assert {file.name for file in (path / "figures").iterdir()} == {"objective.png", "training.png"}
    assert [row["step"] for row in read_metrics(path)] == list(range(10, 61, 10))


@pytest.fixture
def tiny(monkeypatch):
    config = replace(
        PRESETS["omniglot-small"], channels=(8, 8), context=4, steps=2, ways=3, queries=1,
        inner_steps=3, baselines=(("proto", 2),), settings=((3, 1),), test_tasks=4,
        test_queries=2, speed_tasks=4, speed_steps=(4,), speed_rates=(0.1,),
        speed_momentum_rates=(1.0,), log_every=1,
    )  # fmt: skip
    monkeypatch.setitem(TASK.presets, "tiny", config)


@pytest.mark.slow
def test_a_run_is_evaluated_on_any_characters_with_options_of_its_own(tiny, tmp_path, capsys):
    write_zip(tmp_path / "a", "omniglot_resized", drawings(0, {"Greek": 3, "Angelic": 4}, 28))
    path = tmp_path / "run"
    run("train", "--preset", "tiny", "--run-dir", path, "--data-root", tmp_path / "a")
    # Fewer characters than a training task has.
    write_folder(tmp_path / "mine", drawings(1, {"Klingon": 2}, 105))
    evaluation = ("evaluate", "--run-dir", path, "--data-root", tmp_path / "mine")
    run(*evaluation, "--ways", 2, "--shots", 2, "--tasks", 5)
    summary = json.loads((path / "summary.json").read_text())
    assert {name for name in summary if "accuracy" in name} == {
        f"{prefix}accuracy_2w2s{suffix}"
        for prefix in ("", "proto_", "pixels_")
        for suffix in ("", "_ci95")
    }
    assert summary["test_tasks"] == 5
    assert not [name for name in summary if name.startswith("seconds_step")]
    assert "3-way tasks need 3 characters and there are 2" in capsys.readouterr().out
    assert (path / "figures" / "training.png").is_file()
    assert "5-way tasks need 5 characters and there are 2" in fail(capsys, *evaluation, "--ways", 5)
    assert "has 4 images, and tasks of 3 shots and 2 queries need 5" in fail(
        capsys, *evaluation, "--ways", 2, "--shots", 3
    )
    for name in ("--ways", "--shots", "--tasks", "--queries"):
        assert f"{name} 0 leaves nothing to test" in fail(capsys, *evaluation, name, 0)

    write_folder(tmp_path / "lake", one_shot_runs())
    run("evaluate", "--run-dir", path, "--data-root", tmp_path / "lake")
    summary = json.loads((path / "summary.json").read_text())
    assert summary["one_shot_runs"] == 2
    assert summary["accuracy_one_shot_runs"] == 1.0  # queries are the support's own pictures


def test_mistakes_are_found_before_training_and_the_learner_is_trained_last(
    tiny, tmp_path, monkeypatch, capsys
):
    trained = []
    monkeypatch.setattr(train, "fit", lambda *given: trained.append(given[3].path.name))
    write_zip(tmp_path, "omniglot_resized", drawings(0, {"Greek": 1, "Angelic": 3}, 28))
    given = ("--preset", "tiny", "--data-root", tmp_path, "--run-dir", tmp_path / "run")
    assert "--ways 0 leaves nothing to test" in fail(capsys, *given, "--ways", 0)
    assert not trained
    run("train", *given, "--resume")
    assert trained == ["proto", "run"]


def one_shot_runs() -> dict[str, bytes]:
    """Two runs in Lake's format, 3-way, whose test pictures are those of the training."""
    files = {}
    for run_name in ("run01", "run02"):
        pictures = list(drawings(2, {"Klingon": 3}, 105, count=1).values())
        for number, picture in enumerate(pictures, 1):
            files[f"{run_name}/training/class{number:02}.png"] = picture
            files[f"{run_name}/test/item{4 - number:02}.png"] = picture
        files[f"{run_name}/class_labels.txt"] = "".join(
            f"{run_name}/test/item{4 - number:02}.png {run_name}/training/class{number:02}.png\n"
            for number in (1, 2, 3)
        ).encode()
    return files


def test_mistakes_are_one_sentence(tiny, tmp_path, monkeypatch, capsys):
    of_three_ways = TASK.presets["tiny"]
    message = fail(capsys, "--preset", "tiny", "--data-root", tmp_path, "--run-dir", tmp_path / "a")
    assert "omniglot/images_background.zip was not found" in message
    write_zip(tmp_path, "omniglot_resized", drawings(0, {"Greek": 1, "Angelic": 3}, 28))
    for changes, says in (
        ({"ways": 5}, "5-way tasks need 5 characters and there are 4"),
        ({"settings": ((4, 1),)}, "4-way tasks need 4 characters and there are 3"),
    ):
        monkeypatch.setitem(TASK.presets, "tiny", replace(of_three_ways, **changes))
        place = ("--data-root", tmp_path, "--run-dir", tmp_path / says[:1])
        assert says in fail(capsys, "--preset", "tiny", *place)
