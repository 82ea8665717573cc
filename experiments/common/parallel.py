"""Data parallelism: the batch is spread over all devices, the state is on each of them.

The compiled training step is partitioned by XLA, which adds the sums over devices. Nothing in the
step has to know; on one device nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.common.errors import UserError

PyTree = Any

_AXIS = "batch"


class DataParallel:
    """Places states and batches on all devices.

    Args:
        devices: The devices; None for all that jax sees.
    """

    def __init__(self, devices: list[jax.Device] | None = None):
        devices = jax.devices() if devices is None else devices
        self._count = len(devices)
        mesh = Mesh(np.array(devices), (_AXIS,))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._spread = NamedSharding(mesh, PartitionSpec(_AXIS))

    def compile(self, update: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]) -> Any:
        """`update(state, batch) -> (state, metrics)`, compiled; the old state is given up."""
        if self._count == 1:
            return jax.jit(update, donate_argnums=0)
        # Else XLA might leave parts of the new state on one device each.
        return jax.jit(update, donate_argnums=0, out_shardings=(self._everywhere, None))

    def replicate(self, state: PyTree) -> PyTree:
        """The state on every device."""
        return state if self._count == 1 else jax.device_put(state, self._everywhere)

    def spread(self, batch: PyTree) -> PyTree:
        """The batch with the first axis of each leaf spread over the devices, in equal parts.

        Raises:
            UserError: A leaf's first axis is not divisible by the number of devices.
        """
        if self._count == 1:
            return batch
        sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
        uneven = [size for size in sizes if size % self._count]
        if uneven:
            raise UserError(
                f"a batch of {uneven[0]} cannot be spread evenly over {self._count} devices; "
                "choose a multiple, or show jax fewer devices (CUDA_VISIBLE_DEVICES)."
            )
        return jax.device_put(batch, self._spread)
