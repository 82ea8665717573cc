"""Training steps that are not finite: withheld, then saved for study or counted.

A step is not finite if one of its metrics is not, or turns a finite entry of the state into an
infinity or NaN. It leaves no trace: the compiled step itself returns the state it was given, so
that the host, which learns of it a step later, finds the state as it was before. Nothing is copied
or waited for on the way.

A folder that training saved is loaded with

    saved = load_non_finite(Path("runs/TASK/RUN/non_finite"), state, batch)
    update(saved.state, saved.batch)

where `state` and `batch` are any of the same structure, as training starts from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from experiments.common.checkpoints import CheckpointWriter, restore_newest
from experiments.common.errors import UserError

PyTree = Any

CULPRIT = "non_finite"
"""Among the metrics of a guarded step: -1, or the number of what is not finite; see `culprit`."""

_skips: ContextVar[bool] = ContextVar("skips", default=False)


class Guarded(NamedTuple):
    """A training state that steps which are not finite do not change.

    Attributes:
        state: What the unguarded step changes.
        halted: Whether there was such a step, after which nothing changes the state any more.
    """

    state: PyTree
    halted: Array


class NonFinite(NamedTuple):
    """A step that was not finite.

    Attributes:
        step: Its number, from 1.
        state: The training state before it.
        batch: What it was given.
        culprit: What was not finite: "loss", "state.params.kernel".
    """

    step: int
    state: PyTree
    batch: PyTree
    culprit: str


@contextmanager
def skip_non_finite(skip: bool) -> Iterator[None]:
    """Inside the block, training leaves out steps that are not finite, or stops at them."""
    token = _skips.set(skip)
    try:
        yield
    finally:
        _skips.reset(token)


def skips_non_finite() -> bool:
    """Whether training leaves out steps that are not finite."""
    return _skips.get()


def guard(state: PyTree) -> Guarded:
    """The state, to be given to a guarded step."""
    return Guarded(state, jnp.zeros((), bool))


def guarded(
    update: Callable[[PyTree, PyTree], tuple[PyTree, dict[str, Array]]], skip: bool
) -> Callable[[Guarded, PyTree], tuple[Guarded, dict[str, Array]]]:
    """A training step that is withheld where it is not finite.

    Args:
        update: `update(state, batch) -> (state, metrics)`, to be compiled.
        skip: Whether later steps go on from the state before. They draw new random numbers: PRNG
            keys move on even then. Else nothing changes the state any more.

    Returns:
        The same of a `Guarded`, with `CULPRIT` among the metrics.
    """

    def step(before: Guarded, batch: PyTree) -> tuple[Guarded, dict[str, Array]]:
        after, metrics = update(before.state, batch)
        culprit = _first_non_finite(metrics, before.state, after)
        failed = culprit >= 0
        withheld = before.halted | failed

        def choose(old: Array, new: Array) -> Array:
            moves_on = skip and jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
            return new if moves_on else jnp.where(withheld, old, new)

        halted = before.halted if skip else withheld
        state = jax.tree.map(choose, before.state, after)
        return Guarded(state, halted), metrics | {CULPRIT: culprit}

    return step


def culprit(number: int, metrics: dict[str, Any], state: PyTree) -> str:
    """The name of what was not finite, given the value of `CULPRIT` and any metrics and state."""
    names = sorted(set(metrics) - {CULPRIT})
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    names += [f"state.{jax.tree_util.keystr(at, simple=True, separator='.')}" for at, _ in leaves]
    return names[number]


def save_non_finite(folder: Path, found: NonFinite) -> None:
    """Save what a step that was not finite was given.

    Raises:
        UserError: It cannot be written.
    """
    writer = CheckpointWriter(folder)
    arrays = {"state": found.state, "batch": found.batch}
    writer.save(found.step, arrays, {"culprit": found.culprit})
    writer.close()


def load_non_finite(folder: Path, state: PyTree, batch: PyTree) -> NonFinite:
    """What the last step that was not finite was given.

    Args:
        folder: `non_finite` in the run directory.
        state: A training state of the same structure: arrays or `jax.ShapeDtypeStruct`.
        batch: A batch of the same structure.

    Raises:
        UserError: There is none, or state or batch are of another structure or shape.
    """
    restored = restore_newest(folder, {"state": state, "batch": batch}, discard=False)
    if restored is None:
        raise UserError(f"{folder} holds no step: training met none that was not finite.")
    arrays, notes = restored.state, restored.notes
    return NonFinite(restored.step, arrays["state"], arrays["batch"], notes["culprit"])


def _first_non_finite(metrics: dict[str, Array], before: PyTree, after: PyTree) -> Array:
    """The number of the first metric, or leaf of the state, that is not finite; -1 if all are."""
    flags = [_any_non_finite(jnp.asarray(metrics[name])) for name in sorted(metrics)]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        flags.append(_any_non_finite(new, unless=old))
    stacked = jnp.stack(flags)
    return jnp.where(jnp.any(stacked), jnp.argmax(stacked), -1).astype(jnp.int32)


def _any_non_finite(new: Array, unless: Array | None = None) -> Array:
    """Whether an entry is not finite (where `unless` is): other than floats always are."""
    if not jnp.issubdtype(new.dtype, jnp.inexact):
        return jnp.zeros((), bool)
    bad = ~jnp.isfinite(new)
    return jnp.any(bad if unless is None else bad & jnp.isfinite(unless))
