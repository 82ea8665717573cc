"""The classifier whose features compare distributions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from experiments.common.data import ArrayImages, ImageData, Split
from experiments.common.runs import RunRecord, start_run
from experiments.generative.classifier import load_classifier, train_classifier
from experiments.generative.config import PRESETS

CONFIG = replace(PRESETS["smoke"], classifier_steps=80, log_every=40, checkpoint_every=80)


def two_classes(seed, count, labels=(3, 8)):
    """Images that are bright on the left, or on the right."""
    random = np.random.default_rng(seed)
    which = random.integers(0, 2, count)
    pixels = 0.2 * random.random((count, 6, 6, 1), np.float32)
    pixels[which == 0, :, :3] += 0.7
    pixels[which == 1, :, 3:] += 0.7
    return Split(ArrayImages(pixels), np.array(labels, np.int32)[which])


def test_labels_of_any_value_are_learned_and_features_tell_the_classes_apart(tmp_path):
    data = ImageData("halves", two_classes(0, 60), two_classes(1, 40))
    run = start_run(tmp_path / "run", RunRecord.new("generative", "smoke", 0, CONFIG))
    train_classifier(CONFIG, run, data)
    found = load_classifier(CONFIG, run, data)
    assert found.accuracy(data.test) == 1
    assert found.accuracy(two_classes(1, 10, labels=(3, 9))) is None  # 9 was never seen
    features = found.features(data.test.first(40))
    assert features.shape == (40, 64)
    left = data.test.labels == 3
    between = np.linalg.norm(features[left].mean(0) - features[~left].mean(0))
    assert between > 3 * features[left].std(0).mean()


def test_without_labels_there_is_no_classifier(tmp_path):
    data = ImageData("bare", Split(ArrayImages(np.zeros((4, 6, 6, 1), np.float32))), None)
    run = start_run(tmp_path / "run", RunRecord.new("generative", "smoke", 0, CONFIG))
    with pytest.raises(ValueError, match="bare has no labels"):
        train_classifier(CONFIG, run, data)
