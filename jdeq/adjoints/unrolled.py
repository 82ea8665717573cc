"""The gradient of the iteration itself, with its steps recomputed instead of stored."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _tree
from jdeq._shards import vary_alike
from jdeq.adjoints import base
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.iterate import step_limit
from jdeq.solution import Solution

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Backpropagation through all steps of the solver, each problem's own number of them.

    The derivative of what the solver computed, converged or not, as ``theta`` and the inputs moved
    it; the start is a constant. It tends to the implicit gradient as the solve converges. Memory
    is one iterate (and solver memory) a step up to ``max_steps``: within a step everything is
    computed anew. How far a problem went is taken from the forward solve and is no function of the
    parameters. Reverse mode only. Behind a solver that divides by differences of its last
    residuals, as ``Anderson`` does, a second derivative loses digits to rounding as the tolerance
    tightens: take a moderate one, or ``Implicit``.
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
        """See ``jdeq.adjoints.Adjoint.solve``; there is no backward solve to probe."""
        base.refuse_probe("Unrolled", probe)

        @jax.custom_vjp
        def solve(theta, inputs, z0, controls):
            return equilibrium.run(theta, inputs, z0, controls)

        def forward(theta, inputs, z0, controls):
            solution = solve(theta, inputs, z0, controls)
            return solution, (theta, inputs, z0, controls, solution)

        def backward(saved, cotangent):
            theta, inputs, z0, controls, solution = saved
            bad = base.failed(solution.result)
            z0, inputs = base.donate(bad, (z0, inputs))
            steps = jnp.minimum(
                solution.steps, step_limit(equilibrium.options.max_steps, controls.budget)
            )
            _, vjp = jax.vjp(
                lambda theta, inputs: _replay(equilibrium, theta, inputs, z0, steps), theta, inputs
            )
            theta_bar, inputs_bar = vjp(base.mask_problems(bad, cotangent.value))
            theta_bar = base.mask_shared(jnp.all(bad), theta_bar)
            return theta_bar, base.mask_problems(bad, inputs_bar), None, None

        solve.defvjp(forward, backward)
        return solve(theta, inputs, z0, controls)


def _replay(
    equilibrium: Equilibrium, theta: PyTree, inputs: PyTree, z0: PyTree, steps: Array
) -> PyTree:
    """The iterate of least residual among the first ``steps`` of each problem, as in the solve."""

    @jax.checkpoint
    def step(carry: tuple, k: Array) -> tuple[tuple, None]:
        z, memory, best, lowest = carry
        fz = equilibrium.f(theta, inputs, z)
        residual = lax.stop_gradient(_tree.norm(_tree.subtract(fz, z)))
        better = (residual < lowest) & (k < steps)
        best = _tree.select(better, z, best)
        z_next, memory = equilibrium.options.solver.step(z, fz, memory, k)
        # A finished problem stands still, so that it can neither overflow nor be differentiated.
        z_next = _tree.select(k + 1 < steps, z_next, lax.stop_gradient(z))
        return (z_next, memory, best, jnp.where(better, residual, lowest)), None

    lowest = jnp.full_like(lax.stop_gradient(_tree.norm(z0)), jnp.inf)
    carry = (z0, equilibrium.options.solver.init(z0), z0, lowest)
    (_, _, best, _), _ = lax.scan(
        step, vary_alike(carry), jnp.arange(equilibrium.options.max_steps)
    )
    return best
