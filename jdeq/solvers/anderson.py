"""Anderson acceleration, types I and II."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _options, _tree, _windows

PyTree = Any


class AndersonMemory(NamedTuple):
    """The differences of the last iterations; slot ``j`` of every window holds the same step.

    With residual ``g = f(z) - z`` and target ``y = z + mixing g``:

    Attributes:
        last_g: residual of the previous iterate, like z.
        last_y: target of the previous iterate, like z.
        dg: differences of residuals, every leaf ``[B, window, n]``.
        dy: differences of targets, every leaf ``[B, window, n]``.
        gram: the products that the least-squares problem needs, ``[B, window, window]``: type II
            ``dg_i . dg_j``, type I ``dz_i . dg_j``.
        rhs: its right-hand side, ``[B, window]``: type II ``dg_i . last_g``, type I
            ``dz_i . last_g``.
        kept: which slots hold a difference that counts, bool ``[B, window]``.
        lowest: lowest residual norm of this solve since its last restart, ``[B]``.
    """

    last_g: PyTree
    last_y: PyTree
    dg: PyTree
    dy: PyTree
    gram: Array
    rhs: Array
    kept: Array
    lowest: Array


@dataclasses.dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (Anderson 1965; Walker and Ni, SIAM J. Numer. Anal. 2011).

    With ``g_k = f(z_k) - z_k`` and differences over the last ``window`` steps,

        z_{k+1} = z_k + mixing g_k - (dZ + mixing dG) gamma

    where type II takes ``gamma = argmin ||g_k - dG gamma||`` (a multisecant estimate of the inverse
    Jacobian, Broyden's second method in kind) and type I solves ``dZ^T dG gamma = dZ^T g_k`` (of
    the Jacobian, Broyden's first). Each problem has its own ``gamma``. Windows are kept leaf by
    leaf; one step reads them twice, once for the new products and once for the combination.

    Attributes:
        window: number of differences kept, at least 1.
        kind: ``"II"`` (residual-minimising; robust, the default) or ``"I"``.
        mixing: step along the mixed residual, in (0, 1].
        regularization: at least 0, added to the size of the diagonal of the system for ``gamma``
            once that is scaled to one; 0 is none, and the more there is the nearer is the step to
            the damped Picard step. None is ten times the rounding unit of the dtype.
        restart: above 1: a problem whose residual exceeds this times its lowest empties its window
            and goes on with a damped Picard step. None never does, which lets the residual rise
            for a while, as it often must on the way to a faster fall.

    Raises:
        ValueError: if an option is outside its range.
    """

    window: int = 5
    kind: Literal["I", "II"] = "II"
    mixing: float = 1.0
    regularization: float | None = None
    restart: float | None = None

    def __post_init__(self) -> None:
        _options.check_count("Anderson", "window", self.window)
        _options.check_choice("Anderson", "kind", self.kind, ("I", "II"))
        _options.check_fraction("Anderson", "mixing", self.mixing)
        if self.regularization is not None:
            _options.check_nonnegative("Anderson", "regularization", self.regularization)
        if self.restart is not None and not (_options.is_real(self.restart) and self.restart > 1):
            raise ValueError(
                f"Anderson: restart={self.restart!r} was given, but a number above 1 is expected; "
                f"pass None for no restarts."
            )

    def init(self, z: PyTree) -> AndersonMemory:
        """Empty windows for iterates like ``z``."""
        windows = _windows.empty(z, self.window)
        leaves = jax.tree.leaves(z)
        dtype = _tree.accumulation_dtype(jnp.result_type(*leaves))
        count = leaves[0].shape[0]
        zeros = _tree.zeros_like(z)
        return AndersonMemory(
            last_g=zeros,
            last_y=zeros,
            dg=windows,
            dy=windows,
            gram=jnp.zeros((count, self.window, self.window), dtype),
            rhs=jnp.zeros((count, self.window), dtype),
            kept=jnp.zeros((count, self.window), bool),
            lowest=jnp.full((count,), jnp.inf, dtype),
        )

    def step(
        self, z: PyTree, fz: PyTree, memory: AndersonMemory, k: Array
    ) -> tuple[PyTree, AndersonMemory]:
        """One accelerated step; the first one is the damped Picard step."""
        g = _tree.subtract(fz, z)
        y = _tree.relax(z, fz, self.mixing)
        dg, dy = _tree.subtract(g, memory.last_g), _tree.subtract(y, memory.last_y)
        # In step 0 there is no difference yet: what is written then is zero and leaves gamma so.
        new = k > 0
        slot = jnp.mod(k - 1, self.window)
        windows_dg, windows_dy = (
            _windows.write(window, _tree.select(new, vector, _tree.zeros_like(vector)), slot)
            for window, vector in ((memory.dg, dg), (memory.dy, dy))
        )
        kept, lowest = self._keep(memory, g, k, slot)

        gram, rhs = self._products(
            memory, (windows_dg, windows_dy), (dg, dy), g, slot=slot, new=new
        )
        gamma = self._solve(gram, rhs, kept)
        z_next = _tree.subtract(y, _windows.combine(windows_dy, gamma, y))
        return z_next, AndersonMemory(g, y, windows_dg, windows_dy, gram, rhs, kept, lowest)

    def _keep(
        self, memory: AndersonMemory, g: PyTree, k: Array, slot: Array
    ) -> tuple[Array, Array]:
        """Which slots count from now on, and the lowest residual since the last restart."""
        kept = memory.kept | (jnp.arange(self.window) == slot)
        if self.restart is None:
            return kept, memory.lowest
        residual = _tree.norm(g).astype(memory.lowest.dtype)
        # The lowest residual of an earlier solve is no standard for a memory that goes on from it.
        lowest = jnp.where(k > 0, memory.lowest, jnp.inf)
        restarts = residual > self.restart * lowest
        lowest = jnp.where(restarts, residual, jnp.minimum(residual, lowest))
        return kept & ~restarts[:, None], lowest

    def transposed_inverse(self, memory: AndersonMemory, v: PyTree) -> PyTree:
        """The multisecant estimate, transposed; see ``InverseEstimator.transposed_inverse``.

        The step is ``-H g`` with ``H = -mixing I + (dZ + mixing dG) M``, where ``M g`` is
        ``gamma``: ``M = (dG^T dG)^{-1} dG^T`` of type II, ``(dZ^T dG)^{-1} dZ^T`` of type I. So
        ``H dG = dZ``, as of the inverse of ``dg/dz = df/dz - I``, and the estimate is ``-H^T v``.
        """
        (dy_dot_v,) = _windows.products(memory.dy, [v])
        weights = self._solve(jnp.swapaxes(memory.gram, 1, 2), dy_dot_v, memory.kept)
        secants = _windows.combine(memory.dg, weights, v)
        if self.kind == "I":
            steps = _windows.combine(memory.dy, weights, v)
            secants = jax.tree.map(
                lambda a, b: a - jnp.asarray(self.mixing, a.dtype) * b, steps, secants
            )
        return jax.tree.map(lambda a, b: jnp.asarray(self.mixing, a.dtype) * a - b, v, secants)

    def _products(
        self,
        memory: AndersonMemory,
        windows: tuple[PyTree, PyTree],
        differences: tuple[PyTree, PyTree],
        g: PyTree,
        *,
        slot: Array,
        new: Array,
    ) -> tuple[Array, Array]:
        """The products with the newest difference replaced, and the right-hand side for ``g``."""
        dg, dy = differences
        if self.kind == "II":
            (row,) = _windows.products(windows[0], [dg])
            column, newest = row, _tree.dot(dg, g)
        else:
            # dz = dy - mixing dg, so its products need no third window.
            dz = jax.tree.map(lambda a, b: a - jnp.asarray(self.mixing, a.dtype) * b, dy, dg)
            row, along = _windows.products(windows[0], [dz, dg])
            (column,) = _windows.products(windows[1], [dg])
            column, newest = column - self.mixing * along, _tree.dot(dz, g)
        gram = lax.dynamic_update_index_in_dim(memory.gram, jnp.where(new, row, 0), slot, 1)
        gram = lax.dynamic_update_index_in_dim(gram, jnp.where(new, column, 0), slot, 2)
        here = jnp.arange(self.window) == slot
        rhs = jnp.where(here, jnp.where(new, newest, 0)[:, None], memory.rhs + column)
        return gram, rhs

    def _solve(self, gram: Array, rhs: Array, kept: Array) -> Array:
        """``gamma [B, window]``; zero, a plain step, where the system has no finite solution."""
        gram = jnp.where(kept[:, :, None] & kept[:, None, :], gram, 0)
        rhs = jnp.where(kept, rhs, 0)
        regularization = self.regularization
        if regularization is None:
            regularization = 10 * float(jnp.finfo(gram.dtype).eps)
        diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
        size = jnp.abs(diagonal)
        unit = lax.rsqrt(jnp.where(size > 0, size, 1))
        scaled = gram * unit[:, :, None] * unit[:, None, :]
        # Type I has a negative diagonal where f contracts: more of it must still mean less gamma.
        diagonal = jnp.where(size > 0, jnp.sign(diagonal) * regularization, 1 + regularization)
        scaled += diagonal[:, :, None] * jnp.eye(self.window, dtype=gram.dtype)
        solve = _eliminate if self.kind == "II" else _solve_general
        gamma = solve(scaled, rhs * unit) * unit
        finite = jnp.all(jnp.isfinite(gamma), axis=1, keepdims=True)
        return jnp.where(finite, gamma, 0)


def _solve_general(matrix: Array, rhs: Array) -> Array:
    return jnp.linalg.solve(matrix, rhs[:, :, None])[:, :, 0]


def _eliminate(matrix: Array, rhs: Array) -> Array:
    """Solves positive definite systems ``[B, m, m]`` by Gauss-Jordan elimination.

    Their pivots need no exchange. A few operations on the whole batch for each row take a fraction
    of the time of a library call for each small system.
    """
    system = jnp.concatenate([matrix, rhs[:, :, None]], axis=2)
    for i in range(matrix.shape[1]):
        row = system[:, i] / system[:, i, i, None]
        system = (system - system[:, :, i, None] * row[:, None]).at[:, i].set(row)
    return system[:, :, -1]
