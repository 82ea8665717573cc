"""Generative runs that can be built on, and those that cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from experiments.common.data import ArrayImages, ImageData, Split
from experiments.common.errors import UserError
from experiments.common.runs import RunRecord, holds_run, open_run, start_run
from experiments.generative.config import PRESETS as GENERATIVE
from experiments.inverse import source as sources
from experiments.inverse.config import PRESETS
from experiments.inverse.source import Source, adopt


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


def test_a_prior_is_of_transformed_images_where_the_generator_was_trained_on_such(monkeypatch):
    images = np.random.default_rng(0).random((6, 4, 4, 1), np.float32)
    split = Split(ArrayImages(images))
    seen = []

    def latents(generator, params, data, config, count):
        seen.append(data.train.first(count))
        return np.random.default_rng(1).normal(size=(20, 2))

    monkeypatch.setattr(sources, "training_latents", latents)
    for settings in (GENERATIVE["smoke"], replace(GENERATIVE["smoke"], augment_flip=True)):
        Source(ImageData("squares", split, split), None, settings, None, None).prior(18)
    plain, transformed = seen
    np.testing.assert_array_equal(plain, images)
    assert len(transformed) == 18
    np.testing.assert_array_equal(transformed[:6], images)
    copies = transformed[6:].reshape(2, *images.shape)
    same = np.abs(copies - images).max(axis=(2, 3, 4)) < 1e-5
    mirrored = np.abs(copies - images[:, :, ::-1]).max(axis=(2, 3, 4)) < 1e-5
    assert (same | mirrored).all()
    assert mirrored.any()
