"""The full gradient of a joint solve: through the equilibrium, the input and the adjoint."""

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
from jdeq.solvers.newton_krylov import NewtonKrylov

PyTree = Any

_SOLVER = NewtonKrylov(dimension=50, forcing=0.01)


@dataclasses.dataclass(frozen=True)
class KKTImplicit(BackwardOptions):
    """Implicit differentiation of the whole KKT point ``s = (z*, x*, mu*)``.

    The point is the fixed point of the augmented map

        F(s) = (f(z, x),  P(x - a g),  (df/dz)^T mu + dl/dz),    g = (df/dx)^T mu + dl/dx

    whatever method found it, with a constant ``a``, and objective and state in units of their own
    size. For a cotangent ``v`` of ``s`` the gradient is ``w^T dF/dtheta`` with
    ``w = (dF/ds)^T w + v``, the implicit function theorem on the joint fixed point (Gurumurthy et
    al. 2021): exact where ``StateImplicit`` holds x, and with it the derivative of any outer loss
    of ``z*`` and ``x*``, as in few-shot learning with a query loss. It takes second derivatives of
    the cell and the objective, and the derivative of the projection, which must exist: no
    constraint may be just about to become active. Its error is that of the point, so ask
    ``joint_solve`` for a tight tolerance.

    Where the Hessian of the reduced objective is singular ``x*`` is not unique and has no
    derivative; the backward solve then does not converge, which ``backward_probe`` shows.

    ``solver``, ``rtol``, ``atol`` and ``max_steps`` of the equation for w: see
    ``jdeq.adjoints.BackwardOptions``, with two differences. No ``solver`` is
    ``NewtonKrylov(dimension=50, forcing=0.01)``, that is restarted GMRES, which needs no
    contraction. And ``rtol`` and ``atol`` add up to one tolerance, a fraction of the cotangent's
    norm: the solution of a singular system is huge, and a residual small beside it means nothing.
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
        del cell
        options = self.run_options(RunOptions(_SOLVER, max_steps, compaction=run.loop.compaction))
        implicit = Implicit(options.solver, max_steps=self.max_steps)

        @jax.custom_vjp
        def solve(given, start, controls, probe):
            return run(given, start, controls)

        def forward(given, start, controls, probe):
            solution = solve(given, start, controls, probe)
            return solution, (given, start, solution, controls, probe)

        def backward(saved, cotangent):
            given, start, solution, controls, probe = saved
            units = run.units(given, start, solution)
            point, v = solution.value, cotangent.value
            unit = units.objective / units.state
            point = point._replace(
                z=_tree.scale(1 / units.state, point.z), mu=_tree.scale(1 / unit, point.mu)
            )
            v = v._replace(z=_tree.scale(units.state, v.z), mu=_tree.scale(unit, v.mu))
            theta_bar, (target_bar, rest_bar, _), adjoint = implicit.pull_back(
                Equilibrium.of(run.augmented_map, options),
                given.theta,
                (given.target, given.rest, units),
                dataclasses.replace(solution, value=point),
                v,
                self._in_proportion(controls),
            )
            given_bar = type(given)(theta_bar, target_bar, rest_bar)
            return given_bar, None, None, base.probe_cotangent(probe, adjoint)

        solve.defvjp(forward, backward)
        return solve(given, start, controls, probe)

    def _in_proportion(self, forward: Controls) -> Controls:
        """All tolerance as a fraction of the cotangent's norm."""
        rtol, atol, budget = self.controls(forward, jnp.ones(()))[:3]
        return Controls(rtol=0.0, atol=rtol + atol, budget=budget)
