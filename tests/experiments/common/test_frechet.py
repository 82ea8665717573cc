"""Fréchet distance in closed form, precision and recall of sets whose overlap is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from experiments.common.frechet import frechet_distance, precision_recall


def draws(seed=0, count=400, dimension=3):
    return np.random.default_rng(seed).normal(size=(count, dimension))


def test_a_set_is_at_no_distance_from_itself_and_shifts_add_their_square():
    a = draws()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + np.array([3.0, 0.0, -4.0])) == pytest.approx(25)


def test_scaling_by_s_adds_the_variance_times_one_minus_s_squared():
    a = draws()
    a -= a.mean(axis=0)
    variance = np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * variance)


def test_covariances_that_do_not_commute():
    a = draws(0) @ np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.3]])
    b = draws(1) @ np.array([[0.5, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, -1.0, 1.0]])
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(np.real(sqrtm(first @ second)))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_a_singular_covariance_is_no_obstacle():
    a = draws() * [1.0, 0.0, 2.0]
    assert frechet_distance(a, a + np.array([0.0, 2.0, 0.0])) == pytest.approx(4)


def test_precision_and_recall_of_equal_distant_and_narrower_sets():
    real = draws(0)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    half = real[real[:, 0] > 0]  # lies among the real ones, but misses half of them
    precision, recall = precision_recall(real, half)
    assert precision == 1
    assert 0.5 < recall < 0.8


def test_precision_and_recall_do_not_depend_on_where_the_origin_is():
    real, generated = draws(0), draws(1) + 0.5
    expected = precision_recall(real, generated)
    assert min(expected) > 0.5
    assert max(expected) < 1
    moved = [(features + 4000).astype(np.float32) for features in (real, generated)]
    assert precision_recall(*moved) == pytest.approx(expected, abs=0.02)


def test_sets_that_are_too_small_or_of_other_dimension_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(draws(count=1), draws())
    with pytest.raises(ValueError, match="same dimension"):
        frechet_distance(draws(dimension=2), draws())
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(draws(count=3), draws())
