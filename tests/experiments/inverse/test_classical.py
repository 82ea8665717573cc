"""The classical baselines on images whose restoration is known."""

from __future__ import annotations

import numpy as np

from experiments.inverse.classical import (
    best_weight,
    denoise,
    inpaint,
    restore_classically,
    upsample,
)
from experiments.inverse.measurements import KINDS
from experiments.inverse.tuning import batch_of

RAMP = np.linspace(0.2, 0.8, 12, dtype=np.float32)
SMOOTH = np.broadcast_to(RAMP[:, None, None] * np.ones((12, 1)), (3, 12, 12, 1))


def test_a_linear_ramp_satisfies_the_biharmonic_equation():
    mask = np.ones((3, 12, 12, 1))
    mask[:, 4:8, 5:9] = 0
    np.testing.assert_allclose(inpaint(mask * SMOOTH, mask), SMOOTH, atol=1e-4)


def test_total_variation_keeps_constants_and_removes_noise():
    flat = np.full((2, 16, 16, 1), 0.5)
    np.testing.assert_allclose(denoise(flat, 0.2), flat, atol=1e-6)
    noisy = flat + 0.2 * np.random.default_rng(0).normal(size=flat.shape)
    assert np.mean((denoise(noisy, 0.5) - flat) ** 2) < 0.1 * np.mean((noisy - flat) ** 2)


def test_the_best_weight_grows_with_the_noise():
    blocks = np.random.default_rng(0).random((8, 4, 4, 1), np.float32)
    images = blocks.repeat(4, axis=1).repeat(4, axis=2)
    weights = (0.0001, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)
    low, high = (
        best_weight(batch_of(name, images), weights) for name in ("denoise02", "denoise04")
    )
    assert 0.0001 < low < high


def test_upsampling_restores_a_ramp_inside():
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, 32)[:, None, None], (2, 32, 32, 1))
    means = ramp.reshape(2, 16, 2, 16, 2, 1).mean(axis=(2, 4))
    restored = upsample(means, 2)
    assert restored.shape == ramp.shape
    np.testing.assert_allclose(restored[:, 12:-12], ramp[:, 12:-12], atol=1e-4)


def test_each_problem_has_its_method():
    images = np.clip(SMOOTH + 0.05 * np.random.default_rng(0).normal(size=SMOOTH.shape), 0, 1)
    for name, kind in KINDS.items():
        batch = batch_of(name, images.astype(np.float32))
        made = restore_classically(kind, batch, weight=0.2)
        assert made.images.shape == images.shape
        assert made.seconds > 0
        seen = np.broadcast_to(np.asarray(batch.how.mask), images.shape) > 0
        if kind.boxed:
            np.testing.assert_allclose(made.images[seen], images[seen], atol=1e-6)
