"""The task's command line on the smoke preset: trained, evaluated, killed, resumed, refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.checkpoints import restore_newest
from experiments.common.runs import RunRecord, open_run, read_metrics, start_run
from experiments.generative.__main__ import TASK
from experiments.generative.config import Config
from experiments.generative.problem import build_generator
from experiments.generative.train import initial_state
from tests.experiments.common import commands
from tests.experiments.common.data import writers

ROOT = Path(__file__).parents[3]
NUMBERS = (
    "psnr_test",
    "psnr_vae",
    "psnr_nested",
    "psnr_pca",
    "frechet_joint",
    "frechet_vae",
    "frechet_train",
    "precision_joint",
    "recall_joint",
    "latent_dim",
    "kkt_state",
    "kkt_adjoint",
    "kkt_stationarity",
    "speedup_nested",
    "speedup_published",
    "seconds_train",
)


run, fail = partial(commands.run, TASK), partial(commands.fail, TASK)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "smoke"
    run("--preset", "smoke", "--run-dir", path)
    return path


def test_the_smoke_preset_leaves_a_complete_run(smoke):
    summary = json.loads((smoke / "summary.json").read_text())
    for name in NUMBERS:
        assert isinstance(summary[name], int | float), name
        assert not math.isnan(summary[name]), name
    assert summary["latent_dim"] == 16
    assert summary["test_images"] == 360
    assert summary["step"] == 60
    assert isinstance(summary["device"], str)
    assert all(isinstance(value, int | float | str) for value in summary.values())
    figures = {path.name for path in (smoke / "figures").iterdir()}
    assert figures == {
        "interpolation.png", "nearest.png", "objective.png", "reconstructions.png",
        "residuals.png", "samples.png", "samples_vae.png",
    }  # fmt: skip
    # Training images are nearer to test images than a smoke run's samples are.
    assert summary["frechet_train"] < summary["frechet_joint"]
    rows = read_metrics(smoke)
    assert [row["step"] for row in rows] == list(range(10, 61, 10))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert not list(smoke.rglob("*.tmp"))


@pytest.mark.slow
def test_export_writes_samples_and_real_images(smoke):
    run("export", "--run-dir", smoke)
    folders = {path.name: len(list(path.iterdir())) for path in (smoke / "export").iterdir()}
    kinds = ("joint_normal", "joint_mixture", "joint_auxiliary", "vae_prior", "vae_mixture")
    assert folders == dict.fromkeys((*kinds, "test", "train"), 360)


def test_mistakes_are_one_sentence(smoke, tmp_path, capsys):
    assert "unknown preset 'imagenet'" in fail(capsys, "--preset", "imagenet")
    message = fail(
        capsys, "--preset", "mnist", "--data-root", tmp_path, "--run-dir", tmp_path / "a"
    )
    assert "mnist/train-images-idx3-ubyte.gz was not found" in message
    assert "preset smoke, not mnist" in fail(capsys, "--preset", "mnist", "--run-dir", smoke)
    assert "trained run" in fail(capsys, "--preset", "smoke", "--run-dir", smoke)
    record = open_run(smoke, "generative").record
    start_run(tmp_path / "b", record)
    assert "no checkpoint yet" in fail(capsys, "evaluate", "--run-dir", tmp_path / "b")


def test_too_few_test_images_are_refused(tmp_path, capsys):
    train, test = writers.random_images(0, 9, 28, 28), writers.random_images(1, 3, 28, 28)
    writers.write_mnist(tmp_path, train, test)
    start_run(tmp_path / "run", RunRecord.new("generative", "mnist", 0, TASK.presets["mnist"]))
    given = ("evaluate", "--run-dir", tmp_path / "run", "--data-root", tmp_path)
    assert "mnist has 3 test images; at least 4 are needed" in fail(capsys, *given)


def states(path):
    opened = open_run(path, "generative")
    config = opened.record.settings_as(Config)
    _, params = build_generator(config, (8, 8, 1), 0)
    restored = restore_newest(opened.checkpoints, initial_state(config, params, 0), discard=False)
    key = jax.random.key_data(restored.state.key)
    return restored.step, jax.tree.leaves(restored.state._replace(key=key))


@pytest.mark.slow
@pytest.mark.parametrize("row", [1, 2, 3, 5])
def test_killed_and_resumed_it_ends_bit_for_bit_the_same(smoke, tmp_path, row):
    path = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.generative", "train", "--preset", "smoke"]
    with subprocess.Popen([*command, "--run-dir", path], cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(path)) < row:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    run("train", "--run-dir", path, "--resume")
    step, leaves = states(path)
    expected_step, expected = states(smoke)
    assert step == expected_step == 60
    for one, other in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_an_interrupted_run_is_evaluated_on_data_of_another_folder(tmp_path, monkeypatch, capsys):
    train, test = writers.random_images(0, 96, 28, 28), writers.random_images(1, 40, 28, 28)
    writers.write_mnist(tmp_path / "first", train, test)
    writers.write_mnist(tmp_path / "second", train[:70], test[:33])
    config = TASK.presets["smoke"].__class__(
        dataset="mnist", image_size=None, generator="dense", latent_dim=8, steps=30, hidden=32,
        batch_size=16, inner_steps=10, evaluation_steps=20, mixture_components=2,
        vae_steps=10, nested_steps=5, classifier_steps=10, evaluation_nested_steps=5,
        speed_problems=16, speed_joint_steps=(20,), speed_joint_rates=(0.3,),
        speed_nested_steps=(10,), speed_nested_rates=(0.3,), log_every=5, checkpoint_every=10,
    )  # fmt: skip
    monkeypatch.setitem(TASK.presets, "tiny", config)
    path = tmp_path / "run"
    run("train", "--preset", "tiny", "--run-dir", path, "--data-root", tmp_path / "first")
    (path / "checkpoints" / "30").rename(tmp_path / "taken")
    run("evaluate", "--run-dir", path, "--data-root", tmp_path / "second")
    assert "evaluating step 20 of 30" in capsys.readouterr().out
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["train_images"], summary["test_images"]) == (70, 33)
    writers.write_mnist(
        tmp_path / "third",
        writers.random_images(0, 30, 14, 14),
        writers.random_images(1, 9, 14, 14),
    )
    message = fail(capsys, "evaluate", "--run-dir", path, "--data-root", tmp_path / "third")
    assert "use data of the size" in message
