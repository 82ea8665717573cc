"""The order in which batches are drawn: fixed by the seed and the step, through grain."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from experiments.common.data.images import Split
from experiments.common.parallel import local_rows


class OrderedBatches:
    """An endless iterator of batches whose position can be saved.

    Attributes:
        size: Examples a batch, of all processes together.
    """

    def __init__(self, dataset: grain.IterDataset, size: int):
        self.size = size
        self._iterator = iter(dataset)

    def __iter__(self) -> OrderedBatches:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON can hold it; the same for any number of processes."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at this position."""
        self._iterator.set_state(state)


def batches(split: Split, batch_size: int, seed: int) -> OrderedBatches:
    """Endless batches in an order that depends on the seed alone, reshuffled every epoch.

    `get_state()` of the iterator is a small dictionary that JSON can hold; `set_state()` of it
    continues with the next batch, as if nothing had happened.

    With several processes each reads its own rows of every batch; order and position are those of
    one process that reads all.

    Args:
        split: Where the images and labels come from.
        batch_size: Images a batch; every batch is full, the last one of an epoch takes from the
            next epoch.
        seed: Seed of the order, at least 0 and below 2**32.

    Returns:
        An iterator over {"image": float32 [batch_size, H, W, C] in [0, 1], "index": int32
        [batch_size], their places in the split}, with "label": int32 [batch_size] where the split
        has labels.

    Raises:
        UserError: The batch cannot be spread evenly over the devices of several processes.
    """
    rows = local_rows(batch_size)

    def read(indices: list[int]) -> dict[str, np.ndarray]:
        chosen = np.asarray(indices[rows])
        batch = {"image": split.images.read(chosen), "index": chosen.astype(np.int32)}
        if split.labels is not None:
            batch["label"] = split.labels[chosen]
        return batch

    order = grain.MapDataset.range(len(split)).shuffle(seed=seed).repeat()
    # Images in memory need no threads; files are read ahead, a few batches at most, so that the
    # memory in use does not depend on the size of the data set.
    threads = 0 if split.images.in_memory else 4
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    dataset = order.batch(batch_size, batch_fn=list).map(read)
    return OrderedBatches(dataset.to_iter_dataset(options), batch_size)
