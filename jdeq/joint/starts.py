"""Warm starts kept by example, for data sets that are seen again.

    store = starts.init(like, examples=len(train), keep=("x", "mu"), max_bytes=2**30)
    ...
    start = starts.lookup(store, index, cold)
    solution = joint_solve(problem, params, target, start.x, start.z, mu0=start.mu)
    store = starts.update(store, index, solution)

All functions are pure and may be jitted; the store is a pytree of arrays that belongs into the
training state and its checkpoints. Donated to the jitted step, it is updated in place.

A warm start saves iterations under a method whose first steps suit it. ``Accelerated`` steps in
proportion to the gradient; the default Adam of ``Descent`` and ``Polished`` moves every entry of x
by its step size, however good the start: give it a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jdeq import _options, _tree
from jdeq.adjoints import base
from jdeq.joint.augmented import AugmentedState
from jdeq.solution import Solution

PyTree = Any

_EMPTY = -1


class StartStore(NamedTuple):
    """Augmented states of examples that were seen before.

    Attributes:
        owner: the example whose state each slot holds, int32 ``[slots]``; -1 where it is empty.
        state: what is kept, every leaf ``[slots, ...]``; None for a block that is not.
    """

    owner: Array
    state: AugmentedState


def init(
    like: AugmentedState,
    examples: int,
    *,
    max_bytes: int | None = None,
    keep: Sequence[Literal["z", "x", "mu"]] = ("z", "x", "mu"),
    dtype: DTypeLike | None = None,
) -> StartStore:
    """An empty store with a slot for every example, or as many as fit.

    Args:
        like: augmented state of any number of problems, every leaf ``[B, ...]``; arrays or
            ``jax.ShapeDtypeStruct``. Blocks that are not kept may be None.
        examples: size of the data set, at least 1.
        max_bytes: limit on the memory of the store; None is none. Of the published CelebA
            generator ``z`` and ``mu`` take 983,040 bytes an example each in float32, x takes 512.
        keep: the blocks to keep, at least one of them.
        dtype: floating dtype to keep them in, ``jnp.bfloat16`` say; None keeps their own.

    Returns:
        The store.

    Raises:
        ValueError: if an option is out of range, or ``max_bytes`` holds not even one example.
    """
    owner = "starts.init"
    _options.check_count(owner, "examples", examples)
    if not keep or not set(keep) <= set(AugmentedState._fields):
        raise ValueError(
            f"{owner}: keep={keep!r} was given, but some of 'z', 'x' and 'mu' are expected; keep "
            f"'x' at least if memory is short."
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{owner}: dtype={dtype!r} was given, but a floating-point dtype is expected; None "
            f"keeps the dtypes of the states."
        )

    def slot(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype if dtype is None else dtype)

    blocks = {name: block if name in keep else None for name, block in like._asdict().items()}
    one = jax.tree.map(slot, AugmentedState(**blocks))
    slots = examples
    if max_bytes is not None:
        _options.check_count(owner, "max_bytes", max_bytes)
        size = np.dtype(np.int32).itemsize
        size += sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
        slots = min(examples, max_bytes // size)
        if slots == 0:
            raise ValueError(
                f"{owner}: max_bytes={max_bytes} was given, but one example takes {size} bytes; "
                f"give more, keep fewer of 'z', 'x' and 'mu', or pass dtype=jnp.bfloat16."
            )
    state = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), one)
    return StartStore(jnp.full((slots,), _EMPTY, jnp.int32), state)


def holds(store: StartStore, index: Array) -> Array:
    """Whether the store has a start for each example of ``index`` (int ``[B]``), bool ``[B]``."""
    return (index >= 0) & (store.owner[_slot(store, index)] == index)


def lookup(store: StartStore, index: Array, cold: AugmentedState) -> AugmentedState:
    """The starts of a batch of examples.

    Args:
        store: the store.
        index: the examples, int ``[B]``.
        cold: the start of what is not in the store, every leaf ``[B, ...]``: of examples that it
            does not hold, and of the blocks that it does not keep.

    Returns:
        An augmented state like ``cold``.
    """
    slot, known = _slot(store, index), holds(store, index)

    def block(kept: PyTree, otherwise: PyTree) -> PyTree:
        if kept is None:
            return otherwise
        warm = _tree.cast_like(jax.tree.map(lambda leaf: leaf[slot], kept), otherwise)
        return _tree.select(known, warm, otherwise)

    return AugmentedState(*map(block, store.state, cold))


def update(store: StartStore, index: Array, solution: Solution) -> StartStore:
    """The store with what a solve of a batch of examples found.

    Problems that diverged or were not finite leave the store as it is. Example ``i`` belongs into
    slot ``i`` modulo the number of slots, and a slot that is taken is not given to another example:
    in the random order of training, where all are seen equally often, a slot that changed hands
    would rarely be found again by the example that had it.

    Args:
        store: the store.
        index: the examples, int ``[B]``; a negative one is not stored.
        solution: of ``joint_solve`` or ``input_value``.

    Returns:
        The store after it.
    """
    slot, count = _slot(store, index), index.shape[0]
    holder = store.owner[slot]
    wanted = (index >= 0) & ((holder == _EMPTY) | (holder == index))
    wanted &= ~base.failed(solution.result)
    # Several examples of a batch may want one slot: all its parts must go to the same, the first.
    slots = store.owner.shape[0]
    order = jnp.arange(count, dtype=jnp.int32)
    first = jnp.full((slots,), count, jnp.int32).at[slot].min(jnp.where(wanted, order, count))
    place = jnp.where(first[slot] == order, slot, slots)

    def write(kept: PyTree, new: PyTree) -> PyTree:
        if kept is None:
            return None
        return jax.tree.map(
            lambda leaf, value: leaf.at[place].set(value.astype(leaf.dtype), mode="drop"), kept, new
        )

    owner = store.owner.at[place].set(index.astype(jnp.int32), mode="drop")
    return StartStore(owner, AugmentedState(*map(write, store.state, solution.value)))


def _slot(store: StartStore, index: Array) -> Array:
    return jnp.mod(index, store.owner.shape[0])
