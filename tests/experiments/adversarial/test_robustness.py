"""Intervals, paired differences, and the checks for masked gradients."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.adversarial.attacks import Attacked
from experiments.adversarial.robustness import accuracies, paired_difference, wilson_interval


def outcome(hits):
    logits = np.where(np.asarray(hits, bool)[:, None], [1.0, 0.0], [0.0, 1.0])
    return Attacked(logits, logits, logits, logits[:, 0])


def test_wilson_intervals():
    low, high = wilson_interval(np.arange(100) < 90)
    # The roots of (p - 0.9)^2 = z^2 p (1 - p) / 100.
    for root in (low, high):
        assert (root - 0.9) ** 2 == pytest.approx(1.959964**2 * root * (1 - root) / 100)
    assert wilson_interval(np.ones(10, bool))[1] == pytest.approx(1.0)
    assert wilson_interval(np.zeros(10, bool))[0] == pytest.approx(0.0)
    assert wilson_interval(np.ones(10, bool))[0] < 0.8


def test_paired_differences_know_that_images_are_shared():
    first = np.arange(1000) < 900
    second = first.copy()
    second[:10] = False
    middle, low, high = paired_difference(first, second)
    assert middle == pytest.approx(0.01)
    assert 0.0 < low < 0.01 < high < 0.02
    assert paired_difference(first, first) == (0.0, 0.0, 0.0)


def test_accuracies_of_all_models_and_attacks():
    labels = np.zeros(4, int)
    hits = {"clean": [1, 1, 1, 1], "joint": [1, 1, 0, 0], "fgsm": [1, 1, 1, 0],
            "pgd20": [1, 0, 1, 0], "pgd100_restarts": [1, 1, 0, 0]}  # fmt: skip
    row = {name: outcome(values) for name, values in hits.items()}
    found = accuracies({"joint": row, "pgd": {**row, "joint": outcome([0, 0, 0, 0])}}, labels)
    assert found["joint_accuracy_clean"] == 1.0
    assert found["joint_accuracy_pgd20"] == 0.5
    assert found["joint_accuracy_worst"] == 0.25
    assert found["pgd_accuracy_joint"] == 0.0
    assert found["joint_minus_pgd_joint"] == 0.5
    assert found["joint_minus_pgd_clean_low"] == 0.0
    assert found["joint_accuracy_pgd20_low"] < 0.5 < found["joint_accuracy_pgd20_high"]
