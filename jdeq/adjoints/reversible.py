"""The gradient of the reversible iteration, its states reconstructed instead of stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _options, _tree, solvers
from jdeq._shards import vary_alike
from jdeq.adjoints import base
from jdeq.adjoints._recorder import Record, Recorder
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.solution import Result, Solution

PyTree = Any

DRIFT = 0.01
"""Relative error of a reconstructed state's residual from which on it is no longer believed."""


class _Walk(NamedTuple):
    """The way back; each problem is at its own step ``k``.

    Attributes:
        k: index of the state ``low``, int32 ``[B]``; below zero at the start of the iteration.
        high: ``a_{k+1}``.
        low: ``a_k``.
        high_bar: cotangent of ``a_{k+1}``.
        low_bar: cotangent of ``a_k`` from ``a_{k+2}`` alone.
        lost: problems whose reconstruction was given up, bool ``[B]``.
        theta_bar: cotangent of theta so far, its floating leaves.
        inputs_bar: cotangent of the inputs so far, their floating leaves.
        steps: steps back, int32 ``[B]``.
    """

    k: Array
    high: PyTree
    low: PyTree
    high_bar: PyTree
    low_bar: PyTree
    lost: Array
    theta_bar: list
    inputs_bar: list
    steps: Array


@dataclasses.dataclass(frozen=True)
class Reversible:
    """Backpropagation through the reversible iteration in constant memory (McCallum et al. 2025).

    For ``solver=jdeq.solvers.Reversible(damping)``, whose steps can be undone:

        a_{k-1} = (a_{k+1} - damping f(a_k)) / (1 - damping)

    The backward pass walks down from the solution and the state before it, and takes one
    evaluation and one vector-Jacobian product a step. The result is the gradient of the iteration
    itself, as of ``Unrolled``, converged or not; the start is a constant. It tends to the implicit
    gradient as the solve converges.

    Undoing a step amplifies rounding: by ``(1 - damping)^{-1/2}`` a step where the map is constant
    and up to ``(1 - damping)^{-1}`` where its derivative is near one, so that at ``damping=0.5``
    float64 is used up after 50 to 100 steps and float32 after 20 to 45. Meanwhile the cotangent
    that is left falls at the rate at which the solve converged. Each problem walks until that is
    below ``rtol`` times its cotangent or the start is reached. The forward pass notes the residual
    norms of up to 64 of its steps; once a reconstructed state's differs from what was noted by
    more than 1 %, or is not finite, the problem's reconstruction is given up, and the rest of its
    walk takes the derivative at the solution instead: off by no more than the solution is from the
    states that it stands for. ``backward_probe`` shows it: its row is the norm of the cotangent
    left, the steps walked, and ``Result.stagnated`` for a reconstruction given up, else
    ``converged``.

    First derivatives in reverse mode only.

    Attributes:
        rtol: where the walk ends, as a fraction of the cotangent's norm, at least 0; None is the
            sum of the forward tolerances, which leaves out about as much as the solve did.

    Raises:
        ValueError: if ``rtol`` is negative.
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None:
            _options.check_nonnegative("Reversible", "rtol", self.rtol)

    def solve(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        z0: PyTree,
        controls: Controls,
        probe: Array | None,
    ) -> Solution:
        """See ``jdeq.adjoints.Adjoint.solve``."""
        solver = equilibrium.options.solver
        if not isinstance(solver, solvers.Reversible):
            raise ValueError(
                f"adjoints.Reversible: the solver is {solver!r}, whose steps cannot be undone, but "
                f"jdeq.solvers.Reversible() is expected; take it, or jdeq.adjoints.Unrolled()."
            )
        recorder = Recorder(solver)
        record = recorder.init(z0)
        if controls.memory is not None:
            record = record._replace(state=controls.memory)
        options = dataclasses.replace(equilibrium.options, solver=recorder)
        recording = dataclasses.replace(equilibrium, options=options)
        solution = base.attach(
            _only_once(partial(self._pull_back, equilibrium, solver.damping)),
            recording,
            theta,
            inputs,
            z0,
            controls._replace(memory=record),
            probe,
        )
        memory = None if controls.memory is None else solution.aux.memory.state
        return dataclasses.replace(solution, aux=solution.aux._replace(memory=memory))

    def _pull_back(
        self,
        equilibrium: Equilibrium,
        damping: float,
        theta: PyTree,
        inputs: PyTree,
        solution: Solution,
        v: PyTree,
        controls: Controls,
    ) -> tuple[PyTree, PyTree, Solution]:
        record: Record = base.donate(base.failed(solution.result), solution.aux.memory)
        rtol = controls.rtol + controls.atol if self.rtol is None else self.rtol
        unit, direction = _tree.in_range(v)
        tolerance = jnp.asarray(rtol) * _tree.norm(direction)
        below, index = record.before_solution(solution)
        floats, rebuild = _split(theta)
        input_floats, rebuild_inputs = _split(inputs)

        def f(floats: list, input_floats: list, z: PyTree) -> PyTree:
            return equilibrium.f(rebuild(floats), rebuild_inputs(input_floats), z)

        def left(walk: _Walk) -> Array:
            bars = _tree.scale(1 / unit, (walk.high_bar, walk.low_bar))
            return _tree.norm(bars[0]) + _tree.norm(bars[1])

        def going(walk: _Walk) -> Array:
            return (walk.k >= 0) & (left(walk) > tolerance)

        def step(walk: _Walk) -> _Walk:
            active = going(walk)
            pushed = _tree.scale(jnp.where(active, damping, 0), walk.high_bar)
            out, vjp = jax.vjp(f, floats, input_floats, walk.low)
            residual = _tree.norm(_tree.subtract(out, walk.low))
            lost = walk.lost | (active & ~record.agrees(walk.k, residual, DRIFT))

            def at_solution(pushed: PyTree) -> tuple:
                point = _tree.select(lost, solution.value, walk.low)
                return jax.vjp(f, floats, input_floats, point)[1](pushed)

            # A state that is not believed may have no finite derivative to multiply by zero.
            bars = lax.cond(jnp.any(lost & ~walk.lost), at_solution, vjp, pushed)
            undone = jax.tree.map(
                lambda high, image: (
                    (high - jnp.asarray(damping, high.dtype) * image)
                    / jnp.asarray(1 - damping, high.dtype)
                ),
                walk.high,
                out,
            )
            new = _Walk(
                k=walk.k - 1,
                high=walk.low,
                low=undone,
                high_bar=_tree.add(walk.low_bar, bars[2]),
                low_bar=_tree.scale(jnp.full(active.shape, 1 - damping), walk.high_bar),
                lost=lost,
                theta_bar=_tree.add(walk.theta_bar, bars[0]),
                inputs_bar=_tree.add(walk.inputs_bar, bars[1]),
                steps=walk.steps + 1,
            )
            # Finished problems stand still, where they are finite.
            new = new._replace(
                **{
                    name: _tree.select(active, getattr(new, name), getattr(walk, name))
                    for name in ("k", "high_bar", "low_bar", "steps")
                }
            )
            away = lost | ~going(new)
            return new._replace(
                high=_tree.select(away, solution.value, new.high),
                low=_tree.select(away, solution.value, new.low),
            )

        count = tolerance.shape[0]
        start = _Walk(
            k=index - 1,
            high=solution.value,
            low=_tree.select(index > 0, below, solution.value),
            high_bar=v,
            low_bar=_tree.zeros_like(v),
            lost=jnp.zeros((count,), bool),
            theta_bar=_tree.zeros_like(floats),
            inputs_bar=_tree.zeros_like(input_floats),
            steps=jnp.zeros((count,), jnp.int32),
        )
        walk = lax.while_loop(lambda walk: jnp.any(going(walk)), step, vary_alike(start))
        code = jnp.where(walk.lost, jnp.int32(Result.stagnated), jnp.int32(Result.converged))
        outcome = Solution(walk.low, code, walk.steps, unit * left(walk))
        return (
            _cotangent(theta, walk.theta_bar),
            _cotangent(inputs, walk.inputs_bar),
            outcome,
        )


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _split(tree: PyTree) -> tuple[list, Callable[[list], PyTree]]:
    """The floating-point leaves of a tree, and the tree as a function of them."""
    leaves, structure = jax.tree.flatten(tree)

    def rebuild(floats: list) -> PyTree:
        rest = iter(floats)
        return jax.tree.unflatten(structure, [next(rest) if _is_float(v) else v for v in leaves])

    return [v for v in leaves if _is_float(v)], rebuild


def _cotangent(tree: PyTree, floats: list) -> PyTree:
    """A cotangent of the tree from those of its floating-point leaves."""
    rest = iter(floats)
    return jax.tree.map(
        lambda v: next(rest) if _is_float(v) else base.zero_tangent(jnp.asarray(v)), tree
    )


def _only_once(pull_back: Callable) -> Callable:
    """``pull_back``, with a refusal for its derivative."""
    once = jax.custom_jvp(lambda *arguments: pull_back(*arguments))

    @once.defjvp
    def refuse(primals: tuple, tangents: tuple) -> Any:
        raise NotImplementedError(
            "adjoints.Reversible: a second derivative was asked for, but it gives first "
            "derivatives in reverse mode only; take jdeq.adjoints.Implicit() or ImplicitForward()."
        )

    return once
