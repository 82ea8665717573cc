"""Distorted training tasks."""

from __future__ import annotations

import numpy as np

from experiments.common.data.tasks import Characters, TaskSampler
from experiments.meta.distortion import DistortedSampler, Distortion, warp


def pictures(count, images=6, size=12):
    """Ink in the middle and a margin of paper."""
    random = np.random.default_rng(0)
    middle = random.integers(0, 2, (count, images, size - 6, size - 6, 1), dtype=np.uint8)
    return Characters(
        tuple(f"c{i}" for i in range(count)),
        tuple(np.pad(stack, ((0, 0), (3, 3), (3, 3), (0, 0))) for stack in middle),
    )


def test_whole_turns_and_shifts_are_exact():
    images = pictures(1).images[0].astype(np.float32)
    quarter = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], float)
    moved = np.array([[1, 0, 2], [0, 1, -3], [0, 0, 1]], float)
    maps = np.tile(np.eye(3), (len(images), 1, 1))
    maps[1], maps[2] = quarter, moved
    warped = warp(images, maps)
    np.testing.assert_array_equal(warped[0], images[0])
    np.testing.assert_array_equal(warped[1], np.rot90(images[1]))
    np.testing.assert_array_equal(warped[2], np.roll(images[2], (-2, 3), (0, 1)))


def test_what_comes_from_beyond_the_edge_is_paper():
    ink = np.ones((1, 5, 7, 1), np.float32)
    far = np.array([[[1, 0, 2], [0, 1, 0], [0, 0, 1]]], float)
    warped = warp(ink, far)
    np.testing.assert_array_equal(warped[0, :3], 1)
    np.testing.assert_array_equal(warped[0, 3:], 0)


def test_no_range_leaves_images_alone_and_maps_stay_in_theirs():
    random = np.random.default_rng(0)
    np.testing.assert_array_equal(
        Distortion(0, 0, 0, 0).draw(random, 4), np.tile(np.eye(3), (4, 1, 1))
    )
    maps = Distortion(turn=0.3, shear=0.2, stretch=0.1, shift=2.0).draw(random, 2000)
    determinant = np.linalg.det(maps)
    # Turns and shears keep areas; the two stretches multiply.
    assert np.exp(-0.2) <= determinant.min() < np.exp(-0.15)
    assert np.exp(0.15) < determinant.max() <= np.exp(0.2)
    assert 1.9 < np.abs(maps[:, :2, 2]).max() <= 2


def test_distorted_tasks_are_those_of_the_seed_in_ink_and_paper():
    given = (pictures(5), 3, 2, 2, 7)
    tasks, plain = DistortedSampler(*given), TaskSampler(*given)
    task = tasks.draw(4)
    for made, again in zip(task, DistortedSampler(*given).draw(4), strict=True):
        np.testing.assert_array_equal(made, again)
    np.testing.assert_array_equal(task.support_label, plain.draw(4).support_label)
    assert task.query.shape == plain.draw(4).query.shape
    assert task.query.dtype == np.float32
    assert set(np.unique(task.query)) == {0.0, 1.0}
    assert not np.array_equal(task.query, plain.draw(4).query)
    batch = next(tasks.batches(2))
    np.testing.assert_array_equal(batch.support[1], tasks.draw(1).support)
