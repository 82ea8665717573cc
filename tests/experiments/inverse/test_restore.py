"""Latents found from what is observed: against closed forms, and mistakes that are refused."""

from __future__ import annotations

import numpy as np
import pytest

import jdeq
from experiments.common.errors import UserError
from experiments.inverse.restore import restore
from tests.experiments.inverse.linear import image_of, images, latents, linear


def regression(observed, matrix, penalty):
    return image_of(latents(observed, matrix, penalty))


def test_noisy_images_are_restored_as_ridge_regression_does():
    generator, params = linear()
    observed = images() + 0.05 * np.random.default_rng(2).normal(size=(4, 4, 3, 1))
    restored = restore(generator, params, observed, noise=0.2, model_error=0.01)
    assert (restored.result == int(jdeq.Result.converged)).all()
    for one, seen in zip(restored.images, observed, strict=True):
        expected = regression(seen.ravel(), np.eye(12), 0.2**2 + 0.01)
        np.testing.assert_allclose(one.ravel(), expected, atol=2e-3)


def test_a_mask_of_ones_own_hides_what_lies_under_it():
    generator, params = linear()
    observed = images()
    seen = np.ones((4, 3, 1))
    seen[1:3, 1] = 0
    broken = np.where(seen > 0, observed, np.nan)
    restored = restore(generator, params, broken, mask=lambda given: ~np.isnan(given))
    for one, clean in zip(restored.images, observed, strict=True):
        matrix = np.diag(seen.ravel())
        expected = regression(seen.ravel() * clean.ravel(), matrix, 1e-3)
        np.testing.assert_allclose(one.ravel(), expected, atol=2e-3)


def test_an_operator_of_ones_own():
    generator, params = linear()
    matrix = np.random.default_rng(3).normal(size=(6, 12)).astype(np.float32)
    clean = images()
    observed = clean.reshape(4, 12) @ matrix.T
    restored = restore(
        generator, params, observed, operator=lambda given: given.reshape(-1, 12) @ matrix.T
    )
    for one, seen in zip(restored.images, observed, strict=True):
        np.testing.assert_allclose(one.ravel(), regression(seen, matrix, 1e-3), atol=2e-3)


def test_mistakes_are_refused():
    generator, params = linear()
    observed = images()

    def refused(match, given=observed, **options):
        with pytest.raises(UserError, match=match):
            restore(generator, params, given, **options)

    def second_hidden(given):
        return np.arange(len(given)).reshape(-1, 1, 1, 1) != 1

    refused("hides all of image 1 .1 of 4", mask=second_hidden)
    refused("other than 0 .hidden. and 1", mask=lambda given: np.full_like(given, 0.5))
    refused("does not broadcast", mask=lambda given: np.ones((2, 4, 3, 1)))
    refused("divide 8-bit images by 255", given=255 * observed)
    refused("not finite", given=np.where(observed > 0.5, np.nan, observed))
    refused("put the mask into the operator", mask=second_hidden, operator=lambda given: given)
    refused(r"shape \(4, 4, 3, 1\), but what was observed has shape \(4, 5\)",
            given=np.zeros((4, 5)), operator=lambda given: given)  # fmt: skip
