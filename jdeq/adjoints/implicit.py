"""The exact gradient of a fixed point by the implicit function theorem, in reverse mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _tree
from jdeq.adjoints import base
from jdeq.adjoints.options import BackwardOptions
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.solution import Solution

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Implicit(BackwardOptions):
    """Implicit differentiation with the adjoint equation solved by a fixed-point solver.

    For ``z = f(theta, z)`` and a cotangent ``v`` of ``z``, the gradient is ``u^T df/dtheta`` where
    ``u = (df/dz)^T u + v`` (Bai, Kolter, Koltun 2019, theorem 1). The equation for ``u`` is itself
    an equilibrium, solved per problem by the same machinery and differentiated by the same rule,
    so second and higher reverse-mode derivatives are exact too. Forward mode is refused by JAX, as
    for every ``custom_vjp``.

    A problem whose forward solve diverged or was not finite contributes zero, and so does one
    whose backward solve did; ``backward_probe`` makes the latter visible.

    ``solver``, ``rtol``, ``atol`` and ``max_steps`` of the adjoint equation, whose right-hand side
    is the cotangent: see ``jdeq.adjoints.BackwardOptions``.
    """

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

        @jax.custom_vjp
        def solve(theta, inputs, z0, controls, probe):
            return equilibrium.run(theta, inputs, z0, controls)

        def forward(theta, inputs, z0, controls, probe):
            # Calling the wrapped solve, not the loop, lets JAX differentiate this rule again.
            solution = solve(theta, inputs, z0, controls, probe)
            return solution, (theta, inputs, solution, controls, probe)

        def backward(saved, cotangent):
            theta, inputs, solution, controls, probe = saved
            theta_bar, inputs_bar, backward_solution = self.pull_back(
                equilibrium, theta, inputs, solution, cotangent.value, controls
            )
            probe_bar = base.probe_cotangent(probe, backward_solution)
            return theta_bar, inputs_bar, None, None, probe_bar

        solve.defvjp(forward, backward)
        return solve(theta, inputs, z0, controls, probe)

    def pull_back(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        solution: Solution,
        cotangent: PyTree,
        controls: Controls,
        start: PyTree | None = None,
    ) -> tuple[PyTree, PyTree, Solution]:
        """Cotangents of ``theta`` and ``inputs`` for one of ``solution.value``.

        Args:
            equilibrium: the map that was solved.
            theta: its shared argument.
            inputs: its per-problem argument.
            solution: its fixed point.
            cotangent: of ``solution.value``.
            controls: tolerances of the forward solve.
            start: first guess of the adjoint variable; None is the cotangent itself.

        Returns:
            The two cotangents and the solution of the adjoint equation.
        """
        bad = base.failed(solution.result)
        z, inputs = base.donate(bad, (solution.value, inputs))
        cotangent = base.mask_problems(bad, cotangent)
        adjoint = self._solve_adjoint(equilibrium, theta, inputs, z, cotangent, controls, start)

        # From here on, problems whose backward solve failed are no better: a map that is finite may
        # have a derivative that is not.
        bad |= base.failed(adjoint.result)
        z, inputs = base.donate(bad, (z, inputs))
        u = base.mask_problems(bad, adjoint.value)
        _, vjp = jax.vjp(lambda theta, inputs: equilibrium.f(theta, inputs, z), theta, inputs)
        theta_bar, inputs_bar = vjp(u)
        theta_bar = base.mask_shared(jnp.all(bad), theta_bar)
        return theta_bar, base.mask_problems(bad, inputs_bar), adjoint

    def _solve_adjoint(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        z: PyTree,
        cotangent: PyTree,
        controls: Controls,
        start: PyTree | None,
    ) -> Solution:
        """Solves ``u = (df/dz)^T u + cotangent``, differentiably."""

        def bind(theta: PyTree, given: tuple[PyTree, PyTree, PyTree]) -> Callable:
            inputs, z, v = given
            _, vjp = jax.vjp(lambda z: equilibrium.f(theta, inputs, z), z)
            return lambda u: _tree.add(vjp(u)[0], v)

        backward = Equilibrium(bind, self.run_options(equilibrium.options))
        # The equation is linear: it is solved for a cotangent whose norm does not leave the range
        # of the dtype.
        unit, v = _tree.in_range(cotangent)
        start = v if start is None else _tree.scale(1 / unit, start)
        controls = self.controls(controls, _tree.norm(v))
        found = self.solve(backward, theta, (inputs, z, v), start, controls, None)
        return dataclasses.replace(
            found, value=_tree.scale(unit, found.value), residual=unit * found.residual
        )
