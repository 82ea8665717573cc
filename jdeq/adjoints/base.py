"""What a gradient of a fixed point is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdeq import _tree
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.solution import Result, Solution

PyTree = Any


@runtime_checkable
class Adjoint(Protocol):
    """Solves an equilibrium and says how its solution is differentiated."""

    def solve(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        z0: PyTree,
        controls: Controls,
        probe: Array | None,
    ) -> Solution:
        """Runs ``equilibrium`` with this differentiation rule attached to ``Solution.value``.

        Args:
            equilibrium: the map and its solver.
            theta: what all problems share.
            inputs: what each problem has of its own, every leaf ``[B, ...]``.
            z0: the start, every leaf ``[B, ...]``; its gradient is zero.
            controls: tolerances and budget.
            probe: zeros ``[B, 3]`` whose cotangent becomes (residual, steps, code) of the backward
                solve, or None.

        Returns:
            The solution.
        """
        ...


@runtime_checkable
class JointAdjoint(Protocol):
    """Solves an input problem jointly and says how its solution is differentiated."""

    def solve(
        self,
        run: Any,
        cell: Callable[[PyTree, tuple, PyTree], PyTree],
        max_steps: int,
        given: Any,
        start: Any,
        controls: Controls,
        probe: Array | None,
    ) -> Solution:
        """Runs a joint solve with this differentiation rule attached to ``Solution.value``.

        Args:
            run: the ``jdeq.joint.run.JointRun``: ``run(given, start, controls)`` is the solve.
            cell: ``cell(theta, (x, *rest), z) -> z``.
            max_steps: the joint solve's step limit.
            given: theta, target and rest, see ``jdeq.joint.run.Given``.
            start: the first augmented state; its gradient is zero.
            controls: tolerances and budget.
            probe: zeros ``[B, 3]`` whose cotangent is the outcome of the backward solve, or None.

        Returns:
            The solution.
        """
        ...


def failed(result: Array) -> Array:
    """Problems whose value is not to be differentiated, bool ``[B]``."""
    return (result == Result.diverged) | (result == Result.non_finite)


def donate(bad: Array, tree: PyTree) -> PyTree:
    """Replaces the entries of ``bad`` problems by those of a good one.

    A vector-Jacobian product at a bad value is NaN even for a zero cotangent, and sums over
    problems would carry it into everyone's gradient. A good problem's values are the only ones at
    which the map is known to be finite.
    """
    donor = jnp.where(bad, jnp.argmin(bad), jnp.arange(bad.shape[0]))
    return jax.tree.map(lambda leaf: leaf[donor], tree)


def mask_problems(bad: Array, tree: PyTree) -> PyTree:
    """Zeros at the ``bad`` problems of a cotangent; leaves without a tangent pass."""
    return jax.tree.map(
        lambda leaf: (
            leaf
            if leaf.dtype == jax.dtypes.float0
            else jnp.where(_tree.expand(bad, leaf), 0, leaf).astype(leaf.dtype)
        ),
        tree,
    )


def mask_shared(all_bad: Array, tree: PyTree) -> PyTree:
    """Zeros for a whole cotangent if no problem was good; leaves without a tangent pass."""
    return jax.tree.map(
        lambda leaf: (
            leaf
            if leaf.dtype == jax.dtypes.float0
            else jnp.where(all_bad, 0, leaf).astype(leaf.dtype)
        ),
        tree,
    )


def zero_tangent(leaf: Array) -> Any:
    """The zero tangent of an array, of dtype float0 where that is not of a floating dtype."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def probe_cotangent(probe: Array | None, backward: Solution) -> Array | None:
    """The outcome of a backward solve in the shape of the probe."""
    if probe is None:
        return None
    rows = (backward.residual, backward.steps, backward.result)
    return jnp.stack([row.astype(probe.dtype) for row in rows], axis=1)
