"""Broyden's methods with limited memory."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree, _windows

PyTree = Any


class BroydenMemory(NamedTuple):
    """The inverse Jacobian of ``g``, ``H = -mixing I + sum_j left_j right_j^T``, and the last step.

    Attributes:
        last_z: previous iterate.
        last_g: residual there, like z.
        last_direction: the estimate times that residual, like z.
        left: every leaf ``[B, window, n]``.
        right: every leaf ``[B, window, n]``.
        kept: which slots belong to the estimate, bool ``[B, window]``.
        written: updates written so far, int32 ``[B]``: the next goes to this slot, modulo the
            window.
    """

    last_z: PyTree
    last_g: PyTree
    last_direction: PyTree
    left: PyTree
    right: PyTree
    kept: Array
    written: Array


@dataclasses.dataclass(frozen=True)
class Broyden:
    """Broyden's quasi-Newton methods on ``g(z) = f(z) - z`` (Broyden 1965).

    With ``s = z_k - z_{k-1}``, ``y = g_k - g_{k-1}``, and ``H`` the estimate of the inverse of
    ``dg/dz`` that starts from ``-mixing I``,

        H <- H + (s - H y) v^T / (v^T y),     z_{k+1} = z_k - damping H g_k

    where the good method has ``v = H^T s``, the least change of the Jacobian's estimate in the
    Frobenius norm, and the bad method ``v = y``, the least change of its inverse's. Updates are
    kept as vectors, leaf by leaf, and dropped all together once ``window`` of them are there. An
    update whose denominator vanishes is left out.

    Attributes:
        window: number of updates kept, at least 1.
        kind: ``"good"`` or ``"bad"``, as textbooks name them.
        mixing: first step along the residual, in (0, 1].
        damping: fraction of the quasi-Newton step that is taken, in (0, 1].

    Raises:
        ValueError: if an option is outside its range.
    """

    window: int = 20
    kind: Literal["good", "bad"] = "good"
    mixing: float = 1.0
    damping: float = 1.0

    def __post_init__(self) -> None:
        _options.check_count("Broyden", "window", self.window)
        _options.check_choice("Broyden", "kind", self.kind, ("good", "bad"))
        _options.check_fraction("Broyden", "mixing", self.mixing)
        _options.check_fraction("Broyden", "damping", self.damping)

    def init(self, z: PyTree) -> BroydenMemory:
        """No updates yet, for iterates like ``z``."""
        windows = _windows.empty(z, self.window)
        zeros = _tree.zeros_like(z)
        count = _tree.problem_count(z)
        kept = jnp.zeros((count, self.window), bool)
        written = jnp.zeros(count, jnp.int32)
        return BroydenMemory(zeros, zeros, zeros, windows, windows, kept, written)

    def step(
        self, z: PyTree, fz: PyTree, memory: BroydenMemory, k: Array
    ) -> tuple[PyTree, BroydenMemory]:
        """One quasi-Newton step; the first one is the mixed Picard step."""
        g = _tree.subtract(fz, z)
        s = _tree.subtract(z, memory.last_z)
        y = _tree.subtract(g, memory.last_g)
        # All problems write the same slot: one that finished an earlier solve sooner leaves some of
        # its own empty.
        written = jnp.max(memory.written)
        slot = jnp.mod(written, self.window)
        dropped = (slot == 0) & (k > 0)
        kept = memory.kept & ~dropped

        (right_g,) = _windows.products(memory.right, [g])
        h_g = self._estimate(memory.left, kept * right_g, g)
        # H y is the difference of two such products, the last of which is known.
        h_y = jax.tree.map(
            lambda new, old, last: (
                new - jnp.where(dropped, -jnp.asarray(self.mixing, last.dtype) * last, old)
            ),
            h_g,
            memory.last_direction,
            memory.last_g,
        )
        v = y
        if self.kind == "good":
            (left_s,) = _windows.products(memory.left, [s])
            v = self._estimate(memory.right, kept * left_s, s)
        u, v = _update(_tree.subtract(s, h_y), v, y, k > 0)

        direction = _tree.add(h_g, _tree.scale(_tree.dot(v, g), u))
        direction = _tree.select(jnp.isfinite(_tree.norm(direction)), direction, h_g)
        z_next = jax.tree.map(lambda a, d: a - jnp.asarray(self.damping, a.dtype) * d, z, direction)
        # In step 0 there is no difference yet, and nothing is written that would count.
        new = (k > 0) & (jnp.arange(self.window) == slot)
        return z_next, BroydenMemory(
            last_z=z,
            last_g=g,
            last_direction=direction,
            left=_windows.write(memory.left, u, slot),
            right=_windows.write(memory.right, v, slot),
            kept=(kept & (jnp.arange(self.window) != slot)) | new,
            written=jnp.full_like(memory.written, written + (k > 0)),
        )

    def transposed_inverse(self, memory: BroydenMemory, v: PyTree) -> PyTree:
        """``-H^T v``; see ``InverseEstimator.transposed_inverse``."""
        (left_v,) = _windows.products(memory.left, [v])
        return jax.tree.map(jnp.negative, self._estimate(memory.right, memory.kept * left_v, v))

    def _estimate(self, window: PyTree, weights: Array, w: PyTree) -> PyTree:
        """``-mixing w + sum_j weights_j window_j``: the estimate, or its transpose, times ``w``."""
        return jax.tree.map(
            lambda a, b: a - jnp.asarray(self.mixing, b.dtype) * b,
            _windows.combine(window, weights, w),
            w,
        )


def _update(error: PyTree, v: PyTree, y: PyTree, wanted: Array) -> tuple[PyTree, PyTree]:
    """The vectors of one update, ``error / (v^T y)`` and ``v``; zeros where there can be none."""
    denominator = _tree.dot(v, y)
    smallest = jnp.finfo(denominator.dtype).eps * _tree.norm(v) * _tree.norm(y)
    usable = wanted & (jnp.abs(denominator) > smallest) & jnp.isfinite(_tree.norm(error))
    factor = jnp.where(usable, 1 / jnp.where(usable, denominator, 1), 0)
    zeros = _tree.zeros_like(v)
    return _tree.select(usable, _tree.scale(factor, error), zeros), _tree.select(usable, v, zeros)
