"""The order of batches: determined by the seed, complete in every epoch, restorable."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from experiments.common.data import ArrayImages, Split, batches


@pytest.fixture
def split():
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None]
    return Split(ArrayImages(pixels), np.arange(10, dtype=np.int32))


def labels(iterator, count):
    return [batch["label"].tolist() for batch in itertools.islice(iterator, count)]


def test_every_epoch_has_every_image_once_in_a_new_order(split):
    order = np.ravel(labels(batches(split, 5, seed=0), 4)).tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_batches_are_full_where_the_epoch_does_not_divide(split):
    order = labels(batches(split, 4, seed=0), 5)
    assert all(len(batch) == 4 for batch in order)
    assert sorted(np.ravel(order)) == sorted([*range(10), *range(10)])


def test_the_seed_determines_the_order(split):
    assert labels(batches(split, 4, seed=3), 6) == labels(batches(split, 4, seed=3), 6)
    assert labels(batches(split, 4, seed=3), 6) != labels(batches(split, 4, seed=4), 6)


def test_a_saved_position_continues_with_the_next_batch(split):
    iterator = batches(split, 4, seed=0)
    labels(iterator, 3)
    position = json.loads(json.dumps(iterator.get_state()))
    expected = labels(iterator, 4)
    other = batches(split, 4, seed=0)
    other.set_state(position)
    assert labels(other, 4) == expected


def test_images_and_labels_belong_together(split):
    batch = next(batches(split, 10, seed=1))
    np.testing.assert_allclose(batch["image"].squeeze() * 255, batch["label"], rtol=1e-6)
    assert batch["image"].dtype == np.float32
    np.testing.assert_array_equal(split.labels[batch["index"]], batch["label"])
    assert batch["index"].dtype == np.int32


def test_images_read_ahead_by_threads_come_in_the_same_order(split):
    class Lazy(ArrayImages):
        @property
        def in_memory(self):
            return False

    lazy = Split(Lazy(split.images.pixels), split.labels)
    iterator = batches(lazy, 4, seed=0)
    assert labels(iterator, 3) == labels(batches(split, 4, seed=0), 3)
    position = iterator.get_state()
    expected = labels(iterator, 2)
    other = batches(lazy, 4, seed=0)
    other.set_state(position)
    assert labels(other, 2) == expected
