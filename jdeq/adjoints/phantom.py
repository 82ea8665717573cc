"""Gradients through a few steps at the equilibrium: phantom gradients and their one-step case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _options, _tree
from jdeq.adjoints import base
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.solution import Solution

PyTree = Any

PullBack = Callable[[Equilibrium, PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
"""``pull_back(equilibrium, theta, inputs, z, cotangent)`` gives cotangents of theta and inputs."""


@dataclasses.dataclass(frozen=True)
class JacobianFree:
    """Jacobian-free backpropagation: one step of the map at its fixed point (Fung et al. 2022).

    For a cotangent ``v`` of ``z`` the gradient is ``v^T df/dtheta``, as if ``z`` on the right of
    ``z = f(theta, z)`` were a constant. It costs one vector-Jacobian product, and is a biased
    gradient, by ``v^T J (I - J)^{-1} df/dtheta`` with ``J = df/dz``; with ``||J|| < 1`` and a
    well-conditioned ``df/dtheta`` it still points downhill (their theorem 3.1). Reverse mode only.
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
        refuse_probe("JacobianFree", probe)
        return solve_with(_one_step, equilibrium, theta, inputs, z0, controls)


@dataclasses.dataclass(frozen=True)
class Phantom:
    """Phantom gradients: a few damped steps of the map at its fixed point (Geng et al. 2021).

    With the damped map ``h = (1 - damping) z + damping f`` and ``steps`` applications of it,

        unrolled  the vector-Jacobian product of ``h`` applied ``steps`` times from ``z*``
        neumann   ``damping sum_{i < steps} v^T ((1 - damping) I + damping J)^i df/dtheta``

    Both tend to the implicit gradient as ``steps`` grows where ``h`` contracts; the bias falls like
    its rate to the power of ``steps``. At a fixed point solved exactly both are the same numbers;
    unrolling keeps every intermediate step in memory, the Neumann series one vector. Reverse mode
    only.

    Attributes:
        steps: applications of the damped map, at least 1.
        damping: in (0, 1].
        kind: ``"neumann"`` or ``"unrolled"``.

    Raises:
        ValueError: if an option is out of range.
    """

    steps: int = 5
    damping: float = 0.5
    kind: Literal["neumann", "unrolled"] = "neumann"

    def __post_init__(self) -> None:
        _options.check_count("Phantom", "steps", self.steps)
        _options.check_fraction("Phantom", "damping", self.damping)
        _options.check_choice("Phantom", "kind", self.kind, ("neumann", "unrolled"))

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
        refuse_probe("Phantom", probe)
        pull_back = self._neumann if self.kind == "neumann" else self._unrolled
        return solve_with(pull_back, equilibrium, theta, inputs, z0, controls)

    def _neumann(
        self, equilibrium: Equilibrium, theta: PyTree, inputs: PyTree, z: PyTree, v: PyTree
    ) -> tuple[PyTree, PyTree]:
        _, vjp = jax.vjp(equilibrium.f, theta, inputs, z)

        # Horner's scheme for the sum: u <- v + ((1 - damping) I + damping J^T) u.
        def step(_: Array, u: PyTree) -> PyTree:
            return _tree.add(v, _tree.relax(u, vjp(u)[2], self.damping))

        u = lax.fori_loop(1, self.steps, step, v)
        factor = jnp.asarray(self.damping)
        theta_bar, inputs_bar, _ = vjp(jax.tree.map(lambda w: factor.astype(w.dtype) * w, u))
        return theta_bar, inputs_bar

    def _unrolled(
        self, equilibrium: Equilibrium, theta: PyTree, inputs: PyTree, z: PyTree, v: PyTree
    ) -> tuple[PyTree, PyTree]:
        def unroll(theta: PyTree, inputs: PyTree) -> PyTree:
            def step(z: PyTree, _: None) -> tuple[PyTree, None]:
                return _tree.relax(z, equilibrium.f(theta, inputs, z), self.damping), None

            return lax.scan(step, z, None, length=self.steps)[0]

        _, vjp = jax.vjp(unroll, theta, inputs)
        return vjp(v)


def _one_step(
    equilibrium: Equilibrium, theta: PyTree, inputs: PyTree, z: PyTree, v: PyTree
) -> tuple[PyTree, PyTree]:
    _, vjp = jax.vjp(lambda theta, inputs: equilibrium.f(theta, inputs, z), theta, inputs)
    return vjp(v)


def refuse_probe(owner: str, probe: Array | None) -> None:
    """Refuses a probe of a backward solve that does not take place."""
    if probe is not None:
        raise ValueError(
            f"{owner}: a backward_probe was given, but this gradient has no backward solve that it "
            f"could report; leave it out, or take jdeq.adjoints.Implicit()."
        )


def solve_with(
    pull_back: PullBack,
    equilibrium: Equilibrium,
    theta: PyTree,
    inputs: PyTree,
    z0: PyTree,
    controls: Controls,
) -> Solution:
    """Runs the equilibrium with ``pull_back`` for its derivative; failed problems contribute zero.

    Args:
        pull_back: what cotangents of the fixed point become.
        equilibrium: the map and its solver.
        theta: what all problems share.
        inputs: what each problem has of its own.
        z0: the start; its gradient is zero.
        controls: tolerances and budget.

    Returns:
        The solution.
    """

    @jax.custom_vjp
    def solve(theta, inputs, z0, controls):
        return equilibrium.run(theta, inputs, z0, controls)

    def forward(theta, inputs, z0, controls):
        # Calling the wrapped solve, not the loop, lets JAX differentiate this rule again.
        solution = solve(theta, inputs, z0, controls)
        return solution, (theta, inputs, solution)

    def backward(saved, cotangent):
        theta, inputs, solution = saved
        bad = base.failed(solution.result)
        z, inputs = base.donate(bad, (solution.value, inputs))
        v = base.mask_problems(bad, cotangent.value)
        theta_bar, inputs_bar = pull_back(equilibrium, theta, inputs, z, v)
        theta_bar = base.mask_shared(jnp.all(bad), theta_bar)
        return theta_bar, base.mask_problems(bad, inputs_bar), None, None

    solve.defvjp(forward, backward)
    return solve(theta, inputs, z0, controls)
