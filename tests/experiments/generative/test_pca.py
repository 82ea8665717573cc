"""The linear yardstick against the definition of principal components."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.common.data import ArrayImages, ImageData, Split, load_images
from experiments.common.metrics import psnr
from experiments.generative import pca
from experiments.generative.config import PRESETS
from experiments.generative.evaluate import pca_of_copies


def expected_error(train, test, components):
    train, test = (images.reshape(len(images), -1).astype(np.float64) for images in (train, test))
    mean = train.mean(axis=0)
    _, _, directions = np.linalg.svd(train - mean, full_matrices=False)
    basis = directions[:components]
    return np.mean((mean + (test - mean) @ basis.T @ basis - test) ** 2)


def test_digits_in_sixteen_components():
    data = load_images("digits")
    error = pca.pca_error(data.train, data.test, 16)
    train, test = data.train.first(2000), data.test.first(2000)
    assert error == pytest.approx(expected_error(train, test, 16), rel=1e-3)
    assert psnr(error) == pytest.approx(19.35, abs=0.02)


def test_images_too_many_for_memory_are_fitted_in_chunks(monkeypatch):
    data = load_images("digits")
    exact = pca.pca_error(data.train, data.test, 16)
    monkeypatch.setattr(pca, "_IN_MEMORY", 0)
    monkeypatch.setattr(pca, "_CHUNK", 400)
    assert pca.pca_error(data.train, data.test, 16) == pytest.approx(exact, rel=0.05)


def test_more_components_than_images_leave_no_training_error():
    images = Split(ArrayImages(np.random.default_rng(0).random((5, 4, 4, 1), np.float32)))
    assert pca.pca_error(images, images, 32) < 1e-10


def test_components_of_transformed_copies_are_reported_where_the_training_has_such():
    images = np.random.default_rng(0).random((5, 4, 4, 1), np.float32)
    train, test = Split(ArrayImages(images)), Split(ArrayImages(images[:, :, ::-1]))
    data = ImageData("squares", train, test)
    run = SimpleNamespace(record=SimpleNamespace(seed=0))
    config = replace(PRESETS["smoke"], latent_dim=10)
    assert pca_of_copies(config, run, data) == {}
    found = pca_of_copies(replace(config, augment_flip=True), run, data)
    assert psnr(pca.pca_error(train, test, 10)) < 20  # mirrored images are not among these
    assert found["psnr_pca_augmented"] > 60
