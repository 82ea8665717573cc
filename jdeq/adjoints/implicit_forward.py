"""The exact gradient of a fixed point in forward mode as well as in reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax

from jdeq import _closures, _tree
from jdeq.adjoints import base
from jdeq.adjoints.options import BackwardOptions
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.solution import Solution

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ImplicitForward(BackwardOptions):
    """Implicit differentiation in every mode: ``jvp``, ``jacfwd``, ``grad``, ``hessian``.

    The derivative of ``z = f(theta, z)`` along a change of theta is the solution of
    ``dz = (df/dz) dz + (df/dtheta) dtheta``, found per problem by the same machinery as ``z``.
    Reverse mode transposes that linear solve. The rule is differentiated by itself, so derivatives
    of any order are exact. A problem whose forward solve failed has a derivative of zero. The
    outcome of the linear solve cannot be read here; where that matters take ``Implicit``.

    ``solver``, ``rtol``, ``atol`` and ``max_steps`` of the linear equations: see
    ``jdeq.adjoints.BackwardOptions``.
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
        """See ``jdeq.adjoints.Adjoint.solve``; the linear solve cannot be probed."""
        if probe is not None:
            raise ValueError(
                "ImplicitForward: a backward_probe was given, but only custom_vjp can report "
                "through a cotangent; leave it out, or take jdeq.adjoints.Implicit()."
            )

        @jax.custom_jvp
        def value_of(theta, inputs, solution, controls):
            return solution.value

        @value_of.defjvp
        def derivative(primals, tangents):
            theta, inputs, solution, controls = primals
            # Calling the wrapped function lets JAX differentiate this rule again.
            z = value_of(*primals)
            solution = dataclasses.replace(solution, value=z)
            return z, self._push_forward(
                equilibrium, theta, inputs, solution, controls, tangents[:2]
            )

        constants = lax.stop_gradient((theta, inputs, z0, controls))
        solution = equilibrium.run(*constants)
        value = value_of(theta, inputs, solution, controls)
        return dataclasses.replace(solution, value=value)

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

        def residual(u: Array) -> Array:
            along = _tree.split_like(u, z)
            _, moved = jax.jvp(lambda z: equilibrium.f(theta, inputs, z), (z,), (along,))
            return u - _tree.join(moved)

        def solve(matvec: Callable[[Array], Array], b: Array) -> Array:
            return self._solve_linear(equilibrium, matvec, b, controls)

        # JAX transposes the solve only if every leaf of the right-hand side depends on the tangents
        # (0.10.2), which a state of several leaves need not have: one leaf has all of them.
        joined = lax.custom_linear_solve(residual, _tree.join(change), solve, solve)
        return _tree.split_like(joined, z)

    def _solve_linear(
        self,
        equilibrium: Equilibrium,
        matvec: Callable[[Array], Array],
        b: Array,
        controls: Controls,
    ) -> Array:
        """``u = u - matvec(u) + b``, zero where it could not be solved."""
        linear, captured = _closures.hoist("ImplicitForward", "the linear map", matvec, b)

        def step(captured: PyTree, b: Array, u: Array) -> Array:
            return u - linear(captured, u) + b

        # jacfwd maps this solve, and compaction is not for use under vmap.
        options = dataclasses.replace(self.run_options(equilibrium.options), compaction=0)
        at = Equilibrium.of(step, options)
        # As in `Implicit`, for a right-hand side whose norm is within the range of the dtype.
        unit, b = _tree.in_range(b)
        found = at.run(captured, b, b, self.controls(controls, _tree.norm(b)))
        u = base.mask_problems(base.failed(found.result), found.value)
        return _tree.scale(unit, u)
