"""Checks of options and arguments; a refusal says what was given, expected, and what to do."""

from __future__ import annotations

import inspect
import math
import numbers
from typing import Any

import jax
import numpy as np

PyTree = Any


def check_fraction(owner: str, name: str, value: float) -> None:
    """Refuses a ``value`` outside (0, 1]."""
    if not (is_real(value) and 0 < value <= 1):
        raise ValueError(
            f"{owner}: {name}={value!r} was given, but a number in (0, 1] is expected; "
            f"1 means undamped."
        )


def check_relaxation(owner: str, name: str, value: float) -> None:
    """Refuses a ``value`` outside (0, 2)."""
    if not (is_real(value) and 0 < value < 2):
        raise ValueError(
            f"{owner}: {name}={value!r} was given, but a number in (0, 2) is expected; below 1 "
            f"damps, above 1 over-relaxes."
        )


def check_count(owner: str, name: str, value: int, least: int = 1) -> None:
    """Refuses a ``value`` that is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(
            f"{owner}: {name}={value!r} was given, but an integer of at least {least} is expected; "
            f"it fixes the compiled program, so pass a Python int."
        )


def check_nonnegative(owner: str, name: str, value: float) -> None:
    """Refuses a ``value`` that is not a finite number of at least 0."""
    if not (is_real(value) and value >= 0):
        raise ValueError(
            f"{owner}: {name}={value!r} was given, but a finite number of at least 0 is expected; "
            f"it fixes the compiled program, so pass a Python float."
        )


def check_tolerance(owner: str, name: str, value: Any) -> None:
    """Refuses a scalar that is not a finite number of at least 0; traced values are not seen."""
    if isinstance(value, jax.core.Tracer):
        ok = np.ndim(value) == 0
    else:
        number: Any = np.asarray(value).item() if np.ndim(value) == 0 else None
        ok = is_real(number) and number >= 0
    if not ok:
        raise ValueError(
            f"{owner}: {name}={value!r} was given, but a finite number of at least 0 is expected; "
            f"pass 0 to switch that tolerance off."
        )


def check_budget(owner: str, value: Any) -> None:
    """Refuses a step budget that is not a whole scalar of at least 1; traced ones are not seen."""
    if value is None:
        return
    whole = np.ndim(value) == 0 and jax.dtypes.issubdtype(_dtype(value), np.integer)
    if not (whole and (isinstance(value, jax.core.Tracer) or int(value) >= 1)):
        raise ValueError(
            f"{owner}: step_budget={value!r} was given, but one integer of at least 1 is expected; "
            f"pass None for no limit besides max_steps."
        )


def check_history(owner: str, value: Any) -> None:
    """Refuses what neither switches the history on or off nor is a function to record."""
    if isinstance(value, bool):
        return
    if not callable(value):
        raise TypeError(
            f"{owner}: history={value!r} was given, but True, False or a function of the iterate "
            f"is expected; True keeps the residuals, a function's outputs are kept besides."
        )
    check_function(owner, "history", value)


def check_compaction(owner: str, value: Any, history: Any) -> None:
    """Refuses what is no number of sizes, and a history of functions of the whole batch."""
    check_count(owner, "compaction", value, least=0)
    if value and callable(history):
        raise ValueError(
            f"{owner}: compaction={value!r} and a function for history were given, but a function "
            f"of the whole batch cannot be recorded once problems have left it; pass history=True, "
            f"or compaction=0."
        )


def check_fold(owner: str, value: Any, kind: type) -> None:
    """Refuses what is no fold over iterates."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{owner}: fold={value!r} was given, but jdeq.Fold(update, start) is expected."
        )
    check_function(owner, "fold.update", value.update)  # type: ignore[attr-defined]


def check_positive(owner: str, name: str, value: Any) -> None:
    """Refuses a ``value`` that is not a finite number above 0."""
    if not (is_real(value) and value > 0):
        raise ValueError(
            f"{owner}: {name}={value!r} was given, but a finite number above 0 is expected."
        )


def check_switch(owner: str, name: str, value: Any) -> None:
    """Refuses a ``value`` that is not a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name}={value!r} was given, but True or False is expected.")


def check_choice(owner: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuses a ``value`` that is not one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{owner}: {name}={value!r} was given, but one of {', '.join(map(repr, choices))} is "
            f"expected."
        )


def check_instance(owner: str, name: str, value: Any, kind: type, examples: str) -> None:
    """Refuses a ``value`` that does not have the methods of protocol ``kind``."""
    if isinstance(value, type) or not isinstance(value, kind) or not _fits(value, kind):
        raise TypeError(
            f"{owner}: {name}={value!r} was given, but an instance such as {examples} is expected."
        )


def _fits(value: Any, kind: type) -> bool:
    """Whether methods of ``value`` take as many arguments as their namesakes in ``kind``.

    Solvers and joint methods both have ``init`` and ``step``: names alone do not tell them apart.
    """
    for name, function in vars(kind).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        count = len(inspect.signature(function).parameters) - 1
        try:
            inspect.signature(getattr(value, name)).bind(*[None] * count)
        except TypeError:
            return False
    return True


def check_function(owner: str, name: str, function: Any) -> None:
    """Refuses what is no function, or cannot key the compilation cache."""
    if not callable(function):
        raise TypeError(
            f"{owner}: {name}={function!r} was given, but a function is expected; see the "
            f"documentation of {owner} for its arguments."
        )
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"{owner}: {name} is a {type(function).__name__}, which cannot be hashed and so cannot "
            f"be compiled once and reused; pass its arrays as params instead, for example "
            f"{name}=lambda module, *args: module(*args) with params=module."
        ) from None


def check_arrays(owner: str, name: str, tree: PyTree) -> None:
    """Refuses a tree with a leaf that is neither an array nor a number."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (isinstance(leaf, numbers.Number) or hasattr(leaf, "dtype")):
            raise TypeError(
                f"{owner}: {name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, but "
                f"arrays and numbers are expected; split a module first (flax.nnx.split, "
                f"equinox.partition) and put it together again inside the cell."
            )


def check_batch(owner: str, reference: str, count: int, **trees: PyTree) -> None:
    """Refuses trees with a leaf whose first axis is not the ``count`` problems of ``reference``."""
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            shape = np.shape(leaf)
            if not shape or shape[0] != count:
                raise ValueError(
                    f"{owner}: {name}{jax.tree_util.keystr(path)} has shape {shape}, but its first "
                    f"axis is the problem axis and {reference} holds {count} problems; give every "
                    f"leaf of {name} a first axis of {count}."
                )


def problem_count(owner: str, name: str, tree: PyTree) -> int:
    """The size of the problem axis of ``tree``, which must have one."""
    leaves = jax.tree.leaves(tree)
    if not leaves or not np.shape(leaves[0]):
        raise ValueError(
            f"{owner}: {name} has no array with a problem axis, but its leaves must have shape "
            f"[B, ...], B the number of problems; add a leading axis of 1 for a single problem."
        )
    count = np.shape(leaves[0])[0]
    if count == 0:
        raise ValueError(f"{owner}: {name} holds no problems; pass at least one.")
    check_batch(owner, name, count, **{name: tree})
    return count


def check_probe(owner: str, probe: Any, count: int) -> None:
    """Refuses a backward probe that is not a floating-point array ``[B, 3]``."""
    if np.shape(probe) != (count, 3) or not jax.dtypes.issubdtype(_dtype(probe), np.floating):
        raise ValueError(
            f"{owner}: backward_probe is {describe(probe)}, but a floating-point array of shape "
            f"{(count, 3)} is expected for {count} problems; pass jnp.zeros(({count}, 3))."
        )


def check_inexact(owner: str, name: str, tree: PyTree) -> None:
    """Refuses a tree with a leaf that is not a floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jax.dtypes.result_type(leaf)
        if not jax.dtypes.issubdtype(dtype, np.floating):
            raise TypeError(
                f"{owner}: {name}{jax.tree_util.keystr(path)} has dtype {dtype}, but a "
                f"floating-point dtype is expected; cast it, for example with .astype('float32')."
            )


def check_same(owner: str, what: str, given: PyTree, expected: PyTree, advice: str) -> None:
    """Refuses an output whose structure, shapes or dtypes differ from what is expected."""
    given_tree: Any = jax.tree.structure(given)
    expected_tree: Any = jax.tree.structure(expected)
    if given_tree != expected_tree:
        raise ValueError(
            f"{owner}: {what} has structure {given_tree}, but {expected_tree} is expected; {advice}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(expected), strict=True)
    for (path, got), want in pairs:
        got_text, want_text = describe(got), describe(want)
        if got_text != want_text:
            raise ValueError(
                f"{owner}: {what}{jax.tree_util.keystr(path)} is {got_text}, but {want_text} is "
                f"expected; {advice}"
            )


def _dtype(leaf: Any) -> Any:
    """The dtype of an array or a number; None of anything else."""
    if isinstance(leaf, numbers.Number) or hasattr(leaf, "dtype"):
        return jax.dtypes.result_type(leaf)
    return None


def describe(leaf: Any) -> str:
    """Dtype and shape of an array, as in ``float32[4, 3]``."""
    return f"{jax.dtypes.result_type(leaf)}{list(np.shape(leaf))}"


def is_real(value: Any) -> bool:
    """Whether ``value`` is a finite real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
