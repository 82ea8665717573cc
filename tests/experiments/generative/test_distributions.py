"""Which sampler is chosen, and what is reported of the others."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.common.data import ArrayImages, ImageData, Split
from experiments.common.frechet import frechet_distance
from experiments.generative.distributions import Samples, compare_distributions


class Pixels:
    """Features that are the pixels themselves."""

    def features(self, images):
        return images.reshape(len(images), -1)

    def accuracy(self, split):
        return None


def images(seed, centre=0.5, spread=0.1, count=60):
    drawn = np.random.default_rng(seed).normal(centre, spread, (count, 2, 2, 1))
    return np.clip(drawn, 0, 1).astype(np.float32)


def samples(*arguments):
    return Samples(None, images(*arguments))


def test_the_sampler_nearest_to_the_training_images_is_reported_against_the_test_images():
    train, test = images(0), images(1, 0.6)
    data = ImageData("squares", Split(ArrayImages(train)), Split(ArrayImages(test)))
    joint = {"near train": samples(2), "near test": samples(3, 0.6), "far": samples(4, 0.1)}
    vae = {"prior": samples(5, 0.3), "mixture": samples(6)}
    summary, chosen = compare_distributions(Pixels(), data, joint, vae)
    assert chosen == summary["sampler_joint"] == "near train"
    flat = Pixels().features
    assert summary["frechet_joint"] == pytest.approx(
        frechet_distance(flat(joint["near train"].images), flat(test))
    )
    assert summary["frechet_joint"] == summary["frechet_joint_near train"]
    assert summary["frechet_joint_near test"] < summary["frechet_joint"]
    assert summary["frechet_vae"] == pytest.approx(
        frechet_distance(flat(vae["prior"].images), flat(test))
    )
    assert summary["frechet_train"] == pytest.approx(frechet_distance(flat(train), flat(test)))
    assert summary["frechet_joint_to_train"] == pytest.approx(
        frechet_distance(flat(joint["near train"].images), flat(train))
    )
    assert summary["frechet_vae_to_train"] == pytest.approx(
        frechet_distance(flat(vae["prior"].images), flat(train))
    )
    assert "classifier_accuracy" not in summary
    assert all(0 <= summary[f"{kind}_joint"] <= 1 for kind in ("precision", "recall"))


def test_training_images_that_are_sorted_are_taken_from_all_of_them():
    train = np.concatenate([images(0, 0.2, count=300), images(1, 0.8, count=300)])
    test = np.concatenate([images(2, 0.2, count=60), images(3, 0.8, count=60)])
    data = ImageData("sorted", Split(ArrayImages(train)), Split(ArrayImages(test)))
    one = {"only": samples(4)}
    summary, _ = compare_distributions(
        Pixels(), data, one, {"prior": one["only"], "mixture": one["only"]}
    )
    # Of the first 120 alone, all of the darker kind, the distance would be above a third.
    assert summary["frechet_train"] < 0.02


def test_as_many_samples_are_compared_as_there_are_images_on_either_side():
    data = ImageData("few", Split(ArrayImages(images(0))), Split(ArrayImages(images(1, count=20))))
    drawn = samples(2)
    of_few = {"prior": drawn, "mixture": drawn}
    summary, _ = compare_distributions(Pixels(), data, {"only": drawn}, of_few)
    flat = Pixels().features
    expected = frechet_distance(flat(drawn.images[:20]), flat(data.test.first(20)))
    assert summary["frechet_joint"] == summary["frechet_vae"] == pytest.approx(expected)
