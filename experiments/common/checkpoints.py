"""Checkpoints of any pytree, through orbax, that are either whole or noticed to be damaged.

Saving is asynchronous: `CheckpointWriter.save` returns once the arrays are copied to the host, so
that the next step may be given their buffers, and training goes on while files are written. What
is on disk is valid at every moment of a kill, see `checkpoint_files`.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from experiments.common import hosts
from experiments.common.checkpoint_files import (
    check_undamaged,
    publish,
    remove,
    remove_unfinished,
    saved_steps,
    unfinished,
)
from experiments.common.errors import UserError, reason
from experiments.common.terminal import warn

PyTree = Any

__all__ = ["CheckpointWriter", "Restored", "restore_newest", "saved_steps"]

_KEEP = 3  # the newest may be damaged, the one before may be wanted, one to spare

# orbax reports every save at length, and failures with a traceback; they are told here.
absl_logging.set_verbosity(absl_logging.FATAL)


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        step: Training steps done.
        state: The saved pytree.
        notes: The JSON values saved with it.
    """

    step: int
    state: PyTree
    notes: dict[str, Any]


class CheckpointWriter:
    """Writes checkpoints in the background and keeps the newest three.

    Args:
        directory: Made if it does not exist; leftovers of killed saves are removed. No other
            writer may be at work in it.
    """

    def __init__(self, directory: Path):
        self._directory = directory.absolute()
        # Folders are named, listed and removed by one process; orbax lets all write into them.
        self._is_primary = jax.process_index() == 0
        if self._is_primary:
            self._directory.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self._directory)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None

    def save(self, step: int, state: PyTree, notes: dict[str, Any]) -> None:
        """Start to save; waits for the save before it, and until the state may be changed.

        Args:
            step: Training steps done; an older checkpoint of this step is replaced.
            state: Pytree of arrays; typed PRNG keys are welcome.
            notes: What JSON can hold, among it the position in the data.

        Raises:
            UserError: This save cannot begin, or the one before failed.
        """
        self.wait()
        try:
            self._orbax.save(
                unfinished(self._directory, step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_named_arrays(state)),
                    notes=ocp.args.JsonSave(notes),
                ),
            )
        except OSError as error:
            raise self._failure(step, error) from error
        self._saving = step, self._thread.submit(self._complete, step)

    def check(self) -> None:
        """Raise what went wrong in the background, without waiting.

        Raises:
            UserError: The save failed.
        """
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being saved, if there is one, is valid.

        Raises:
            UserError: The save failed.
        """
        if self._saving is None:
            return
        (step, outcome), self._saving = self._saving, None
        try:
            outcome.result()
        # A full disk surfaces as whatever the writing library at hand raises.
        except Exception as error:
            raise self._failure(step, error) from error

    def close(self) -> None:
        """Wait for the last save, and release orbax's resources.

        Raises:
            UserError: The save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _complete(self, step: int) -> None:
        self._orbax.wait_until_finished()
        if not self._is_primary:
            return
        publish(self._directory, step)
        for old in saved_steps(self._directory)[:-_KEEP]:
            remove(self._directory, old)

    def _failure(self, step: int, error: Exception) -> UserError:
        if self._is_primary:
            remove_unfinished(self._directory)  # on a full disk they would be in the way
        kept = saved_steps(self._directory)
        remains = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is none before"
        return UserError(
            f"the checkpoint of step {step} cannot be written to {self._directory} "
            f"({reason(error)}); {remains}: make room, or the directory writable, and continue "
            "with --resume."
        )


def restore_newest(directory: Path, template: PyTree, discard: bool) -> Restored | None:
    """The newest checkpoint that is undamaged.

    Each damaged one that is passed over is mentioned on the terminal.

    Args:
        directory: Where `CheckpointWriter` saved.
        template: Pytree of arrays or `jax.ShapeDtypeStruct` of the same structure; a leaf that has
            a sharding is restored with it, any other on the default device.
        discard: Whether to delete the damaged ones, to make room for training to save these
            steps again. Only done once an undamaged one is found.

    Returns:
        The checkpoint, or None if nothing was saved yet.

    Raises:
        UserError: All are damaged, or a readable one is of another structure or shape.
    """
    damaged: list[int] = []
    for step in reversed(_steps_of_first(directory)):
        folder = directory.absolute() / str(step)
        damage = hosts.from_first(partial(_damage, folder))
        if not damage:
            try:
                state, notes = _read(folder, template)
            except UserError:
                raise
            # Damage that the checksums do not show surfaces as whatever the decoder raises.
            except Exception as error:
                if hosts.count() > 1:  # the others may have read it
                    raise
                damage = reason(error)
        if damage:
            warn(f"checkpoint {directory / str(step)} is damaged: {damage}.")
            damaged.append(step)
            continue
        if damaged:
            warn(f"using the checkpoint before: step {step}.")
        if discard and hosts.is_first():
            for other in damaged:
                remove(directory, other)
        return Restored(step, state, notes)
    if damaged:
        raise UserError(
            f"all checkpoints in {directory} are damaged; start a new run in another directory."
        )
    return None


def _steps_of_first(directory: Path) -> list[int]:
    """The saved steps as process 0 sees them: all processes have to take the same."""
    return json.loads(hosts.from_first(lambda: json.dumps(saved_steps(directory))))


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; nothing if it is empty."""
    try:
        check_undamaged(folder)
    except (OSError, ValueError) as error:
        return reason(error)
    return ""


def _read(folder: Path, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    wanted = {_name(where): leaf for where, leaf in leaves}
    items = ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(), notes=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(items) as reader:
        saved = reader.metadata(folder).item_metadata["state"].tree
        target = _target(wanted, saved, folder)
        content = reader.restore(
            folder,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), notes=ocp.args.JsonRestore()
            ),
        )
    arrays = {name: jnp.copy(array) for name, array in content.state.items()}  # may be donated
    filled = [
        jax.random.wrap_key_data(arrays[name]) if _is_key(leaf) else arrays[name]
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(structure, filled), content.notes


def _target(
    wanted: dict[str, Any], saved: dict[str, Any], path: Path
) -> dict[str, jax.ShapeDtypeStruct]:
    """What orbax shall restore: the saved arrays, which must be those of the template."""
    if set(wanted) != set(saved):
        different = sorted(set(wanted) ^ set(saved))[0]
        raise UserError(
            f"{path} was written by another version of the model, which differs in {different}; "
            "use that version, or start a new run."
        )
    return {name: _one_target(name, leaf, saved[name], path) for name, leaf in wanted.items()}


def _one_target(name: str, leaf: Any, saved: Any, path: Path) -> jax.ShapeDtypeStruct:
    plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    if saved.shape != plain.shape or saved.dtype != plain.dtype:
        raise UserError(
            f"{path} holds {name} as {saved.dtype}{list(saved.shape)}, but the model for this "
            f"data has {plain.dtype}{list(plain.shape)}; use data of the size, and the version, "
            "that it was trained with."
        )
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _named_arrays(state: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        _name(where): jax.random.key_data(leaf) if _is_key(leaf) else leaf for where, leaf in leaves
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(where: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(where, simple=True, separator=".")
