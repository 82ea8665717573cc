"""The task's command line on the smoke preset: trained, evaluated, built on another run."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest

from experiments.common.runs import read_metrics
from experiments.inverse.__main__ import TASK
from experiments.inverse.measurements import KINDS
from tests.experiments.common import commands

METHODS = ("", "_vae", "_nested", "_nested_longest", "_unconditional", "_classical")


run, fail = partial(commands.run, TASK), partial(commands.fail, TASK)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "smoke"
    run("--preset", "smoke", "--run-dir", path)
    return path


@pytest.mark.slow
def test_the_smoke_preset_leaves_a_complete_run(smoke):
    summary = json.loads((smoke / "summary.json").read_text())
    for name in KINDS:
        for method in METHODS:
            assert 0 < summary[f"psnr_{name}{method}"] < 60
            assert summary[f"seconds_{name}{method}"] > 0
    assert summary["step"] == 20
    assert summary["test_images"] == 64
    assert not any(isinstance(v, float) and math.isnan(v) for v in summary.values())
    figures = {path.name for path in (smoke / "figures").iterdir()}
    curves = {"psnr_over_time.png", "psnr_over_time_super.png"}
    assert figures == {*(f"{name}.png" for name in KINDS), *curves}
    rows = read_metrics(smoke)
    assert {f"loss_{name}" for name in KINDS} <= set(rows[-1])
    assert not list(smoke.rglob("*.tmp"))


@pytest.mark.slow
def test_it_builds_on_a_trained_generator(smoke, tmp_path, capsys):
    generator = smoke / "generator"
    run("train", "--preset", "smoke", "--run-dir", tmp_path / "a", "--from-run", generator)
    assert "training the variational autoencoder" not in capsys.readouterr().out
    run("evaluate", "--run-dir", tmp_path / "a")
    one, other = (json.loads((p / "summary.json").read_text()) for p in (smoke, tmp_path / "a"))
    for name in KINDS:
        assert one[f"psnr_{name}"] == pytest.approx(other[f"psnr_{name}"], abs=1e-3)
    message = fail(capsys, "evaluate", "--run-dir", tmp_path / "a", "--from-run", generator)
    assert "takes a run as it is" in message


def test_mistakes_are_one_sentence(tmp_path, capsys):
    assert "unknown preset 'imagenet'" in fail(capsys, "--preset", "imagenet")
    path = tmp_path / "run"
    for _ in range(2):  # the directory is as free as before
        assert "holds no run" in fail(capsys, "--run-dir", path, "--from-run", tmp_path / "nowhere")
    assert "no images to export" in fail(capsys, "export", "--run-dir", path)
    message = fail(
        capsys, "--preset", "mnist", "--data-root", tmp_path, "--run-dir", tmp_path / "b"
    )
    assert "mnist/train-images-idx3-ubyte.gz was not found" in message
