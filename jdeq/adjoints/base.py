"""What a gradient of a fixed point is, and what all of them share."""

from __future__ import annotations

import dataclasses
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


def refuse_probe(owner: str, probe: Array | None) -> None:
    """Refuses a probe of a backward solve that does not take place."""
    if probe is not None:
        raise ValueError(
            f"{owner}: a backward_probe was given, but this gradient has no backward solve that it "
            f"could report; leave it out, or take jdeq.adjoints.Implicit()."
        )


PullBack = Callable[
    [PyTree, PyTree, Solution, PyTree, Controls], tuple[PyTree, PyTree, Solution | None]
]
"""``pull_back(theta, inputs, solution, cotangent, controls)`` gives the cotangents of theta and
inputs for one of ``solution.value``, and the outcome of a backward solve, if there was one."""


def attach(
    pull_back: PullBack,
    equilibrium: Equilibrium,
    theta: PyTree,
    inputs: PyTree,
    z0: PyTree,
    controls: Controls,
    probe: Array | None = None,
) -> Solution:
    """Runs the equilibrium with ``pull_back`` for its derivative; failed problems contribute zero.

    Args:
        pull_back: what a cotangent of the fixed point becomes; of failed problems it sees the
            values and inputs of a good one, and a zero cotangent.
        equilibrium: the map and its solver.
        theta: what all problems share.
        inputs: what each problem has of its own.
        z0: the start; its gradient is zero.
        controls: tolerances and budget.
        probe: see ``Adjoint.solve``.

    Returns:
        The solution.
    """

    @jax.custom_vjp
    def solve(theta, inputs, z0, controls, probe):
        return equilibrium.run(theta, inputs, z0, controls)

    def forward(theta, inputs, z0, controls, probe):
        # Calling the wrapped solve, not the loop, lets JAX differentiate this rule again.
        solution = solve(theta, inputs, z0, controls, probe)
        return solution, (theta, inputs, solution, controls, probe)

    def backward(saved, cotangent):
        theta, inputs, solution, controls, probe = saved
        bad = failed(solution.result)
        z, inputs = donate(bad, (solution.value, inputs))
        solution = dataclasses.replace(solution, value=z)
        v = mask_problems(bad, cotangent.value)
        theta_bar, inputs_bar, outcome = pull_back(theta, inputs, solution, v, controls)
        theta_bar = mask_shared(jnp.all(bad), theta_bar)
        probe_bar = None if outcome is None else probe_cotangent(probe, outcome)
        return theta_bar, mask_problems(bad, inputs_bar), None, None, probe_bar

    solve.defvjp(forward, backward)
    return solve(theta, inputs, z0, controls, probe)


def probe_cotangent(probe: Array | None, backward: Solution) -> Array | None:
    """The outcome of a backward solve in the shape of the probe."""
    if probe is None:
        return None
    rows = (backward.residual, backward.steps, backward.result)
    return jnp.stack([row.astype(probe.dtype) for row in rows], axis=1)
