"""The tasks of the embedded data sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from experiments.common.data.tasks import Characters
from experiments.common.errors import UserError
from experiments.meta.accuracy import mean_and_interval
from experiments.meta.config import PRESETS
from experiments.meta.sinusoid import SinusoidSampler
from experiments.meta.tasks import TaskSource, load_tasks


def test_sinusoids_have_the_usual_amplitudes_phases_and_inputs():
    tasks = SinusoidSampler(shots=50, queries=50, seed=3).first(200)
    assert np.abs(tasks.support).max() <= 1
    values = np.concatenate([tasks.support_label, tasks.query_label], axis=1)[..., 0]
    inputs = 5 * np.concatenate([tasks.support, tasks.query], axis=1)[..., 0]
    design = np.stack([np.sin(inputs), np.cos(inputs)], axis=-1)
    for task in range(0, 200, 40):
        (a, b), *_ = np.linalg.lstsq(design[task], values[task], rcond=None)
        np.testing.assert_allclose(design[task] @ [a, b], values[task], atol=1e-4)
        assert 0.1 <= np.hypot(a, b) <= 5
        assert -1e-4 <= np.arctan2(-b, a) <= np.pi + 1e-4
    again = SinusoidSampler(shots=50, queries=50, seed=3).first(1, start=7)
    np.testing.assert_array_equal(again.query[0], tasks.query[7])


def test_no_digit_is_trained_and_tested_on():
    source = load_tasks(PRESETS["smoke"], None)
    assert len(source.train) == len(source.test) == 20
    assert source.shape == (64,)
    assert {name[:7] for name in source.train.names}.isdisjoint(
        {name[:7] for name in source.test.names}
    )
    batch = next(source.training(PRESETS["smoke"], 0))
    assert batch.support.shape == (1, 5, 64)
    assert batch.query.shape == (1, 25, 64)
    test = source.testing(5, 1, 2, 0).draw(0)
    assert not np.array_equal(test.support, source.testing(5, 1, 2, 1).draw(0).support)


def test_training_without_background_characters_is_refused(tmp_path):
    source = TaskSource((2,), Characters((), ()), Characters((), ()), tmp_path)
    with pytest.raises(UserError, match=r"images_background\.zip was not found"):
        source.training(replace(PRESETS["smoke"], ways=2), 0)


def test_intervals_are_of_the_mean_over_tasks():
    values = np.tile([0.0, 1.0], 200)
    mean, interval = mean_and_interval(values)
    assert mean == 0.5
    assert interval == pytest.approx(1.96 * 0.5 / 20, rel=2e-3)
