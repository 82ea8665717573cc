"""Many devices: the batch is spread over all of them, the parameters are copied or spread as well.

The devices form a mesh of two axes. Along `batch` each holds an equal part of every batch, and runs
its solves by itself: the gradient is taken shard by shard (`jax.shard_map`) and averaged once a
step. Left to XLA's own partitioning, the condition of every solve, a reduction over the batch,
would make all devices wait for each other in every iteration. Along `model`, of one device unless
asked for, parameters, their gradients and the optimiser's memory are spread by the rule of
`spread_axis`, and XLA partitions what is computed with them.

The same holds for the devices of several processes, each of which gives its own rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.common import hosts
from experiments.common.errors import UserError
from experiments.common.terminal import say

PyTree = Any

BATCH, MODEL = "batch", "model"

_LEAST_SPREAD = 2**10  # numbers; smaller arrays are copied to every device

_chosen: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def make_mesh(model_devices: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """All devices as a mesh.

    Args:
        model_devices: Devices that share one copy of the parameters, neighbours in the list.
        devices: The devices; None for all that jax sees, those of other processes included.

    Raises:
        UserError: The number of devices is not a multiple of `model_devices`.
    """
    if devices is None:  # those of a process side by side, as its rows of a batch have to be
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if model_devices < 1 or len(devices) % model_devices:
        raise UserError(
            f"{len(devices)} devices cannot be divided into groups of {model_devices} for "
            "--model-devices; choose a divisor."
        )
    grid = np.array(devices).reshape(-1, model_devices)
    return Mesh(grid, (BATCH, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def current_mesh() -> Mesh:
    """The mesh of `use_mesh`, or else all devices, each with a copy of the parameters."""
    mesh = _chosen.get()
    return make_mesh() if mesh is None else mesh


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Train on this mesh inside the block."""
    token = _chosen.set(mesh)
    try:
        yield
    finally:
        _chosen.reset(token)


def spread_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The axis along which an array is spread over the devices of one copy of the parameters.

    It is the longest that divides into equal parts, the last of several; None for small arrays,
    which are copied.
    """
    if parts == 1 or np.prod(shape) < _LEAST_SPREAD:
        return None
    possible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    return max(possible, key=lambda axis: (shape[axis], axis), default=None)


def mesh_for(batch_size: int) -> Mesh:
    """The part of the current mesh over which a batch can be spread evenly.

    In one process as many devices as divide the batch take part, at best all.

    Raises:
        UserError: There are several processes, all of which have to take part.
    """
    mesh = current_mesh()
    shards = mesh.shape[BATCH]
    even = math.gcd(batch_size, shards)
    if even == shards:
        return mesh
    if hosts.count() > 1:
        raise UserError(
            f"a batch of {batch_size} cannot be spread evenly over {shards} devices of "
            f"{hosts.count()} processes; start fewer, so that their devices divide the batch."
        )
    return make_mesh(mesh.shape[MODEL], list(mesh.devices[:even].flat))


def local_rows(batch_size: int) -> slice:
    """The rows of a batch that this process has to give to its devices.

    Raises:
        UserError: See `mesh_for`.
    """
    sharding = _batch_sharding(mesh_for(batch_size))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [part[0].indices(batch_size)[:2] for part in parts if part is not None]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def over_shards(
    function: Callable[..., Any], mesh: Mesh, spread: tuple[bool, ...], out: tuple[bool, ...]
) -> Any:
    """The function, run by every device on its part of the batch.

    Args:
        function: It may average over the devices by `mean_over_shards`.
        mesh: The devices.
        spread: Which arguments have the batch along axis 0; the others are whole on each device.
        out: Which results have the batch along axis 0; the others have to be the same on each.

    Returns:
        The function of whole batches.
    """

    def specs(along_batch: tuple[bool, ...]) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(BATCH) if batch else PartitionSpec() for batch in along_batch)

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs(spread),
        out_specs=specs(out),
        axis_names={BATCH},
        # With its checks JAX would sum gradients over the devices by itself, before their mean.
        check_vma=False,
    )


def mean_over_shards(tree: PyTree) -> PyTree:
    """The mean over the parts of a batch, inside `over_shards`."""
    return lax.pmean(tree, BATCH)


class Devices:
    """Places states and batches on the devices of the current mesh.

    Args:
        batch_size: Examples a batch, of all processes together.

    Raises:
        UserError: The batch cannot be spread evenly, see `mesh_for`.
    """

    def __init__(self, batch_size: int):
        self._mesh = mesh_for(batch_size)
        if batch_size > 1 and self._mesh.size < current_mesh().size:
            say(
                f"a batch of {batch_size} is spread over {self._mesh.size} of "
                f"{current_mesh().size} devices: it does not divide by all."
            )

    def compile(self, update: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]) -> Any:
        """`update(state, batch) -> (state, metrics)`, compiled; the old state is given up."""

        def placed(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            state, metrics = update(state, batch)
            everywhere = NamedSharding(self._mesh, PartitionSpec())
            return (
                lax.with_sharding_constraint(state, self._shardings(state)),
                lax.with_sharding_constraint(metrics, everywhere),
            )

        return jax.jit(update if self._mesh.size == 1 else placed, donate_argnums=0)

    def place(self, state: PyTree) -> PyTree:
        """The state of process 0 on the devices, copied or spread."""
        if self._mesh.size == 1:
            return state
        return jax.tree.map(hosts.place, state, self._shardings(state))

    def template(self, state: PyTree) -> PyTree:
        """Shapes, dtypes and places of the arrays that `place` makes of a state."""
        if self._mesh.size == 1:
            return state
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self._shardings(state),
        )

    def spread(self, batch: PyTree) -> PyTree:
        """The batch over the devices, given this process's rows of it (`local_rows`)."""
        if self._mesh.size == 1:
            return batch
        sharding = _batch_sharding(self._mesh)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
        )

    def _shardings(self, state: PyTree) -> PyTree:
        def sharding(leaf: Any) -> NamedSharding:
            axis = spread_axis(leaf.shape, self._mesh.shape[MODEL])
            names = [MODEL if place == axis else None for place in range(leaf.ndim)]
            return NamedSharding(self._mesh, PartitionSpec(*names))

        return jax.tree.map(sharding, state)


def _batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH))
