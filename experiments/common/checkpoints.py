"""Checkpoints of any pytree, through orbax, that are either whole or noticed to be damaged.

Saving is synchronous: the step's buffers may be donated to the next step at once, and what is on
disk when `save` returns survives a kill. The last file written is a list of all others with their
CRC-32. It makes the checkpoint valid, and finds damage before orbax decodes anything: some damage
would decode to wrong numbers without an error.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from experiments.common.errors import UserError
from experiments.common.files import write_json
from experiments.common.terminal import warn

PyTree = Any

_CHECKSUMS = "checksums.json"
_KEEP = 3  # the newest may be damaged, the one before may be wanted, one to spare

absl_logging.set_verbosity(absl_logging.ERROR)  # orbax reports every save at length


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
    """Writes checkpoints and keeps the newest three.

    Args:
        directory: Made if it does not exist; leftovers of a killed save are removed.
    """

    def __init__(self, directory: Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEEP, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: PyTree, notes: dict[str, Any]) -> None:
        """Save; a step that is already saved is left as it is.

        Args:
            step: Training steps done.
            state: Pytree of arrays; typed PRNG keys are welcome.
            notes: What JSON can hold, among it the position in the data.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named_arrays(state)), notes=ocp.args.JsonSave(notes)
            ),
        )
        folder = self._directory / str(step)
        write_json(folder / _CHECKSUMS, _checksums(folder))

    def close(self) -> None:
        """Release orbax's resources."""
        self._manager.close()


def restore_newest(directory: Path, template: PyTree, discard: bool) -> Restored | None:
    """The newest checkpoint that is undamaged.

    Each damaged one that is passed over is mentioned on the terminal.

    Args:
        directory: Where `CheckpointWriter` saved.
        template: Pytree of arrays or `jax.ShapeDtypeStruct` of the same structure.
        discard: Whether to delete the damaged ones, to make room for training to save these
            steps again. Only done once an undamaged one is found.

    Returns:
        The checkpoint, or None if nothing was saved yet.

    Raises:
        UserError: All are damaged, or a readable one is of another structure or shape.
    """
    damaged: list[int] = []
    for step in sorted(saved_steps(directory), reverse=True):
        try:
            arrays, notes = _read(directory, step)
        # Damage surfaces as whatever the decoder at hand raises.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warn(f"checkpoint {directory / str(step)} is damaged or incomplete: {reason[:200]}.")
            damaged.append(step)
            continue
        state = _fill(template, arrays, directory / str(step))
        if damaged:
            warn(f"using the checkpoint before: step {step}.")
        for other in damaged if discard else []:
            shutil.rmtree(directory / str(other))
        return Restored(step, state, notes)
    if damaged:
        raise UserError(
            f"all checkpoints in {directory} are damaged; start a new run in another directory."
        )
    return None


def saved_steps(directory: Path) -> list[int]:
    """The steps of which a checkpoint exists, damaged or not."""
    if not directory.is_dir():
        return []
    return [int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()]


def _read(directory: Path, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    folder = directory.absolute() / str(step)
    if not (folder / _CHECKSUMS).is_file():
        raise ValueError("it was not written to its end")
    present = _checksums(folder)
    for name, checksum in json.loads((folder / _CHECKSUMS).read_text()).items():
        if present.get(name) != checksum:
            raise ValueError(f"{name} is missing or changed")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder.parent, options=options) as manager:
        target = manager.item_metadata(step).state
        content = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), notes=ocp.args.JsonRestore()
            ),
        )
    return {name: np.asarray(array) for name, array in content.state.items()}, content.notes


def _checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of every file below a checkpoint's folder, but of the list itself."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def _fill(template: PyTree, arrays: dict[str, np.ndarray], path: Path) -> PyTree:
    """The arrays in the template's structure, on the default device."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    names = [_name(where) for where, _ in leaves]
    if set(names) != set(arrays):
        different = sorted(set(names) ^ set(arrays))[0]
        raise UserError(
            f"{path} was written by another version of the model, which differs in {different}; "
            "use that version, or start a new run."
        )
    filled = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        array = arrays[name]
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = jnp.array(array)  # a copy, which may be donated
        if is_key:
            value = jax.random.wrap_key_data(value)
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise UserError(
                f"{path} holds {name} as {value.dtype}{list(value.shape)}, but the model for this "
                f"data has {leaf.dtype}{list(leaf.shape)}; use data of the size, and the version, "
                "that it was trained with."
            )
        filled.append(value)
    return jax.tree.unflatten(structure, filled)


def _named_arrays(state: PyTree) -> dict[str, np.ndarray]:
    arrays = {}
    for where, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        arrays[_name(where)] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return arrays


def _name(where: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(where, simple=True, separator=".")
