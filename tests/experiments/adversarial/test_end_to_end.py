"""The task's command line on the smoke preset: trained, evaluated, continued, refused."""

from __future__ import annotations

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.adversarial.__main__ import TASK
from experiments.adversarial.predict import load_predict
from experiments.common.cli import main
from experiments.common.data import load_images
from experiments.common.errors import UserError
from experiments.common.runs import read_metrics

ATTACKS = ("clean", "joint", "pgd20", "pgd100_restarts", "fgsm", "transfer")
NUMBERS = (
    *(f"{model}_accuracy_{name}" for model in ("clean", "joint", "pgd") for name in ATTACKS),
    "speedup_attack",
    "seconds_epoch_joint",
    "seconds_epoch_pgd",
)


def run(*arguments):
    main(TASK, [str(argument) for argument in arguments])


def test_mistakes_are_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--preset", "imagenet")
    assert "unknown preset 'imagenet'" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown model 'robust'"):
        load_predict(tmp_path, (8, 8, 1), "robust")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "smoke"
    run("--preset", "smoke", "--run-dir", path)
    return path


@pytest.mark.slow
def test_the_smoke_preset_leaves_a_complete_run(smoke):
    summary = json.loads((smoke / "summary.json").read_text())
    for name in NUMBERS:
        assert isinstance(summary[name], int | float), name
        assert not math.isnan(summary[name]), name
    assert all(isinstance(value, int | float | str) for value in summary.values())
    assert summary["test_images"] == 64
    figures = {path.name for path in (smoke / "figures").iterdir()}
    assert figures == {"attacked.png", "radius.png", "attack_loss.png"}
    for part in (smoke, smoke / "clean", smoke / "pgd"):
        assert [row["step"] for row in read_metrics(part)] == [10, 20, 30, 40]


@pytest.mark.slow
def test_predict_is_what_was_evaluated(smoke):
    summary = json.loads((smoke / "summary.json").read_text())
    test = load_images("digits").test
    images, labels = jnp.asarray(test.first(64)), test.labels[:64]
    for model in ("clean", "joint", "pgd"):
        predict = load_predict(smoke, (8, 8, 1), model)
        accuracy = np.mean(np.asarray(jax.jit(predict)(images)).argmax(-1) == labels)
        assert accuracy == summary[f"{model}_accuracy_clean"]


@pytest.mark.slow
def test_a_run_without_its_last_checkpoints_ends_as_if_nothing_had_happened(smoke, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(smoke, path)
    shutil.rmtree(path / "checkpoints")
    shutil.rmtree(path / "pgd" / "checkpoints" / "40")
    run("train", "--run-dir", path, "--resume")
    image = jnp.asarray(load_images("digits").test.first(8))
    for model in ("clean", "joint", "pgd"):
        before, after = (load_predict(p, (8, 8, 1), model)(image) for p in (smoke, path))
        np.testing.assert_array_equal(before, after)
