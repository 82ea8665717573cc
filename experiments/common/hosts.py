"""Many hosts: one process each, or one a device, that run the same program on one batch.

jax connects them (`jax.distributed`). Process 0 alone claims the run directory and writes metrics,
figures and the summary; checkpoints are written and read by all, on a file system that all see.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from experiments.common.errors import UserError, reason

PyTree = Any

HEARTBEAT_SECONDS = 60
"""A process that was not heard of for so long is taken for dead, and all others end."""

_JOIN_SECONDS = 300  # hosts of a cluster may start minutes apart
_GRACE_SECONDS = 3  # with process 0 the service ends that would stop the others in mid-sentence
_MESSAGE = 2**14  # bytes that process 0 can tell the others at once


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Join the other processes of the run; nothing may have been computed before.

    Args:
        coordinator: host:port of process 0; None for what jax finds in the environment.
        processes: How many there are; None as before.
        process_id: Which of them this is, from 0; None as before.

    Raises:
        UserError: jax finds no cluster, or not all processes came.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    # What a cluster's detection or its network raises is of any kind.
    except Exception as error:
        raise UserError(
            f"the processes of the run could not be joined: {reason(error)} Start one process a "
            "host under Slurm, Kubernetes, Open MPI or on a TPU slice, where jax finds the others; "
            "elsewhere give --coordinator HOST:PORT, --processes and --process-id to each."
        ) from error


def end_after(error: Exception) -> NoReturn:
    """Say that one of several processes ends, and why, and end it."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        traceback.print_exception(error)
    sys.stderr.write(
        f"error: process {jax.process_index()} of {count()} ends, most likely because another one "
        f"did ({reason(error)}); when all have ended, start all again with --resume.\n"
    )
    end(1)


def count() -> int:
    """Processes of the run."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return count() == 1 or jax.process_index() == 0


def end(status: int) -> NoReturn:
    """End the process; one of several does not wait for the others, which notice it and end too."""
    if count() == 1:
        sys.exit(status)
    if is_first():
        time.sleep(_GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def from_first(action: Callable[[], str]) -> str:
    """What `action` returns on process 0, on every process.

    Raises:
        UserError: It raised one there; on all processes.
    """
    if count() == 1:
        return action()
    told = np.zeros(_MESSAGE, np.uint8)
    if is_first():
        try:
            outcome = {"value": action()}
        except UserError as error:
            outcome = {"error": str(error)}
        encoded = json.dumps(outcome).encode()
        told[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    heard = np.asarray(multihost_utils.broadcast_one_to_all(told), np.uint8).tobytes()
    outcome = json.loads(heard.rstrip(b"\0"))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def wait(name: str) -> None:
    """Wait until all processes are at the place of this name."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array of process 0, which all have in the same shape, on the devices of all.

    One that is there already is left as it is.
    """
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if count() == 1:
        return jax.device_put(leaf, sharding)
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    numbers = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    numbers = np.asarray(multihost_utils.broadcast_one_to_all(numbers), numbers.dtype)
    placed = jax.make_array_from_callback(numbers.shape, sharding, lambda part: numbers[part])
    return jax.random.wrap_key_data(placed) if is_key else placed
