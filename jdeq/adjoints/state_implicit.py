"""The first-order gradient of a joint solve: through the equilibrium, with x held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _tree
from jdeq.adjoints import base
from jdeq.adjoints.implicit import Implicit
from jdeq.adjoints.options import BackwardOptions
from jdeq.equilibrium import Controls, Equilibrium, RunOptions
from jdeq.solution import Solution
from jdeq.solvers.anderson import Anderson

PyTree = Any


@dataclasses.dataclass(frozen=True)
class StateImplicit(BackwardOptions):
    """Implicit gradient of ``z*`` at constant ``x*``, as in the published training code.

    For a cotangent ``v`` of ``z*`` it solves ``u = (df/dz)^T u + v`` and returns ``u^T df/dtheta``.
    The forward solve's own adjoint ``mu`` solves this equation for ``v = dl/dz``; the solve starts
    from the multiple of ``mu`` that fits ``v`` best, which is the answer already where the outer
    loss is a multiple of the inner one. ``x*`` and ``mu`` are constants: where the outer loss
    depends on how ``x*`` moves with the parameters, this is not its gradient.

    ``solver``, ``rtol``, ``atol`` and ``max_steps`` of the adjoint equation: see
    ``jdeq.adjoints.BackwardOptions``; what the forward solve has is the joint solve's tolerances
    and limit, and ``Anderson()`` for a solver.
    """

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
        """See ``jdeq.adjoints.base.JointAdjoint.solve``."""
        equilibrium = Equilibrium.of(
            cell,
            self.run_options(RunOptions(Anderson(), max_steps, compaction=run.loop.compaction)),
        )
        implicit = Implicit(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)

        @jax.custom_vjp
        def solve(given, start, controls, probe):
            return run(given, start, controls)

        def forward(given, start, controls, probe):
            solution = solve(given, start, controls, probe)
            return solution, (given, solution, controls, probe)

        def backward(saved, cotangent):
            given, solution, controls, probe = saved
            z, x, mu = solution.value
            inputs = (x, *given.rest)
            at_z = dataclasses.replace(solution, value=z)
            v = base.mask_problems(base.failed(solution.result), cotangent.value.z)
            theta_bar, inputs_bar, adjoint = implicit.pull_back(
                equilibrium,
                given.theta,
                inputs,
                at_z,
                v,
                controls,
                start=_multiple_of(mu, v, cell, given.theta, inputs, z),
            )
            given_bar = type(given)(theta_bar, None, inputs_bar[1:])
            return given_bar, None, None, base.probe_cotangent(probe, adjoint)

        solve.defvjp(forward, backward)
        return solve(given, start, controls, probe)


def _multiple_of(
    mu: PyTree, v: PyTree, cell: Callable, theta: Any, inputs: tuple, z: PyTree
) -> PyTree:
    """``c mu`` with the ``c`` that minimises ``||v - c (I - J^T) mu||``, per problem."""
    _, pull_back = jax.vjp(lambda z: cell(theta, inputs, z), z)
    image = _tree.subtract(mu, pull_back(mu)[0])
    square = _tree.dot(image, image)
    usable = jnp.isfinite(square) & (square > 0)
    fit = jnp.where(usable, _tree.dot(v, image) / jnp.where(usable, square, 1), 0)
    return _tree.select(usable, _tree.scale(fit, mu), _tree.zeros_like(mu))
