"""Generative runs that can be built on, and those that cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.common.errors import UserError
from experiments.common.runs import RunRecord, holds_run, open_run, start_run
from experiments.generative.config import PRESETS as GENERATIVE
from experiments.inverse.config import PRESETS
from experiments.inverse.source import adopt


def generative(path, dataset="digits", trained=True):
    settings = replace(GENERATIVE["smoke"], dataset=dataset)
    start_run(path, RunRecord.new("generative", "smoke", 3, settings))
    for part, steps in (("", settings.steps), ("vae", settings.vae_steps)):
        folder = path / part / "checkpoints" / str(steps if trained else 10)
        folder.mkdir(parents=True)
        (folder / "weights").write_text(part)
    return path


def inverse(path):
    return start_run(path, RunRecord.new("inverse", "smoke", 0, PRESETS["smoke"]))


def test_a_trained_run_is_copied_whole(tmp_path):
    given, run = generative(tmp_path / "given"), inverse(tmp_path / "run")
    adopt(PRESETS["smoke"], run, given)
    copy = open_run(run.path / "generator", "generative")
    assert copy.record.seed == 3
    assert (copy.path / "checkpoints" / "60" / "weights").read_text() == ""
    assert (copy.path / "vae" / "checkpoints" / "60" / "weights").read_text() == "vae"


def test_runs_that_do_not_fit_are_refused(tmp_path):
    run = inverse(tmp_path / "run")
    cases = {
        "holds no run": tmp_path / "nowhere",
        "generative inverse|task inverse": inverse(tmp_path / "other").path,
        "holds an unfinished run": generative(tmp_path / "unfinished", trained=False),
        "trained on mnist, but this preset restores digits": generative(tmp_path / "b", "mnist"),
    }
    for match, source in cases.items():
        with pytest.raises(UserError, match=match):
            adopt(PRESETS["smoke"], run, source)
    assert not holds_run(run.path / "generator")
