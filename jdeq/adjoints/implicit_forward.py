"""The exact gradient of a fixed point in forward mode as well as in reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _closures, _tree
from jdeq.adjoints import base
from jdeq.adjoints.implicit import check_backward_options
from jdeq.equilibrium import Controls, Equilibrium, RunOptions
from jdeq.solution import Solution
from jdeq.solvers.base import Solver

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ImplicitForward:
    """Implicit differentiation in every mode: ``jvp``, ``jacfwd``, ``grad``, ``hessian``.

    The derivative of ``z = f(theta, z)`` along a change of theta is the solution of
    ``dz = (df/dz) dz + (df/dtheta) dtheta``, found per problem by the same machinery as ``z``.
    Reverse mode transposes that linear solve. The rule is differentiated by itself, so derivatives
    of any order are exact. A problem whose forward solve failed has a derivative of zero. The
    outcome of the linear solve cannot be read here; where that matters take ``Implicit``.

    Attributes:
        solver: solver of the linear equations; None is the forward one.
        rtol: its relative tolerance; None is the forward one.
        atol: its absolute tolerance, as a fraction of the right-hand side's norm; None is the
            forward one.
        max_steps: its step limit; None is the forward one, the step budget included.

    Raises:
        TypeError: if ``solver`` is not a solver.
        ValueError: if a tolerance is negative or ``max_steps`` below 1.
    """

    solver: Solver | None = None
    rtol: float | None = None
    atol: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_backward_options("ImplicitForward", self.solver, self.rtol, self.atol, self.max_steps)

    def solve(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        z0: PyTree,
        controls: Controls,
        probe: Array | None,
    ) -> Solution:
        """See ``jdeq.adjoints.Adjoint.solve``; the linear solve cannot be probed."""
        if probe is not None:
            raise ValueError(
                "ImplicitForward: a backward_probe was given, but only custom_vjp can report "
                "through a cotangent; leave it out, or take jdeq.adjoints.Implicit()."
            )

        @jax.custom_jvp
        def solve(theta, inputs, z0, controls):
            return equilibrium.run(theta, inputs, z0, controls)

        @solve.defjvp
        def derivative(primals, tangents):
            theta, inputs, _, controls = primals
            # Calling the wrapped solve, not the loop, lets JAX differentiate this rule again.
            solution = solve(*primals)
            dz = self._push_forward(equilibrium, theta, inputs, solution, controls, tangents[:2])
            zeros = jax.tree.map(base.zero_tangent, solution)
            return solution, dataclasses.replace(zeros, value=dz)

        return solve(theta, inputs, z0, controls)

    def _push_forward(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        solution: Solution,
        controls: Controls,
        changes: tuple[PyTree, PyTree],
    ) -> PyTree:
        bad = base.failed(solution.result)
        z, inputs = base.donate(bad, (solution.value, inputs))
        _, change = jax.jvp(
            lambda theta, inputs: equilibrium.f(theta, inputs, z), (theta, inputs), changes
        )
        change = base.mask_problems(bad, change)

        def residual(u: PyTree) -> PyTree:
            _, moved = jax.jvp(lambda z: equilibrium.f(theta, inputs, z), (z,), (u,))
            return _tree.subtract(u, moved)

        def solve(matvec: Callable[[PyTree], PyTree], b: PyTree) -> PyTree:
            return self._solve_linear(equilibrium, matvec, b, controls)

        return lax.custom_linear_solve(residual, change, solve, solve)

    def _solve_linear(
        self,
        equilibrium: Equilibrium,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree,
        controls: Controls,
    ) -> PyTree:
        """``u = u - matvec(u) + b``, zero where it could not be solved."""
        linear, captured = _closures.hoist("ImplicitForward", "the linear map", matvec, b)

        def step(captured: PyTree, b: PyTree, u: PyTree) -> PyTree:
            return _tree.add(_tree.subtract(u, linear(captured, u)), b)

        at = Equilibrium.of(
            step,
            RunOptions(
                self.solver or equilibrium.options.solver,
                self.max_steps or equilibrium.options.max_steps,
            ),
        )
        atol = controls.atol if self.atol is None else self.atol
        found = at.run(
            captured,
            b,
            b,
            Controls(
                rtol=controls.rtol if self.rtol is None else self.rtol,
                atol=jnp.asarray(atol) * _tree.norm(b),
                budget=controls.budget if self.max_steps is None else None,
            ),
        )
        return base.mask_problems(base.failed(found.result), found.value)
