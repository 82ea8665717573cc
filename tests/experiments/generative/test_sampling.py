"""Samples from a mixture on latents look like the latents."""

from __future__ import annotations

import numpy as np

from experiments.generative.sampling import sample_auxiliary, sample_latents, sample_normal


def clusters(count=200):
    noise = np.random.default_rng(0).normal(0, 0.1, (2 * count, 3))
    centres = np.repeat([[10.0, -2.0, 0.0], [-10.0, 2.0, 0.0]], count, axis=0)
    return (noise + centres).astype(np.float32)


def test_samples_come_from_every_cluster_and_from_nowhere_else():
    drawn = sample_latents(clusters(), components=2, count=100, seed=0)
    assert drawn.shape == (100, 3)
    assert drawn.dtype == np.float32
    near = [np.linalg.norm(drawn - centre, axis=1) < 3 for centre in ([10, -2, 0], [-10, 2, 0])]
    assert np.all(near[0] | near[1])
    assert 20 < near[0].sum() < 80


def test_samples_are_not_sorted_by_component_and_depend_on_the_seed_alone():
    drawn = sample_latents(clusters(), components=2, count=100, seed=0)
    side = drawn[:, 0] > 0
    assert 20 < np.sum(side[1:] != side[:-1]) < 80
    np.testing.assert_array_equal(drawn, sample_latents(clusters(), 2, 100, seed=0))
    assert not np.array_equal(drawn, sample_latents(clusters(), 2, 100, seed=1))


def test_fewer_latents_than_components_are_no_error():
    assert sample_latents(clusters(2), components=20, count=5, seed=0).shape == (5, 3)


def test_normal_draws_have_the_mean_and_spread_of_each_entry():
    latents = np.random.default_rng(0).normal([1.0, -5.0], [0.1, 3.0], (500, 2))
    drawn = sample_normal(latents.astype(np.float32), count=2000, seed=0)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.mean(axis=0), [1, -5], atol=0.25)
    np.testing.assert_allclose(drawn.std(axis=0), latents.std(axis=0), rtol=0.05)


def test_the_auxiliary_autoencoder_keeps_clusters_apart():
    drawn = sample_auxiliary(clusters(), components=2, count=100, seed=0)
    assert drawn.shape == (100, 3)
    near = [np.linalg.norm(drawn - centre, axis=1) < 3 for centre in ([10, -2, 0], [-10, 2, 0])]
    assert np.mean(near[0] | near[1]) > 0.95
    assert 20 < near[0].sum() < 80
