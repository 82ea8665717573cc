"""Gradients through a few steps at the equilibrium: phantom gradients and their one-step case."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _options, _tree
from jdeq.adjoints import base
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.solution import Solution

PyTree = Any


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
        base.refuse_probe("JacobianFree", probe)
        return base.attach(
            partial(pull_back_one_step, equilibrium), equilibrium, theta, inputs, z0, controls
        )


@dataclasses.dataclass(frozen=True)
class Phantom:
    """Phantom gradients: a few damped steps of the map at its fixed point (Geng et al. 2021).

    With the damped map ``h = (1 - damping) z + damping f`` and ``steps`` applications of it,

        unrolled  the vector-Jacobian product of h, applied steps times from z*
        neumann   damping sum_{i < steps} v^T ((1 - damping) I + damping J)^i df/dtheta

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
        base.refuse_probe("Phantom", probe)
        pull_back = self._neumann if self.kind == "neumann" else self._unrolled
        return base.attach(
            partial(pull_back, equilibrium), equilibrium, theta, inputs, z0, controls
        )

    def _neumann(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        solution: Solution,
        v: PyTree,
        controls: Controls,
    ) -> tuple[PyTree, PyTree, None]:
        del controls
        _, vjp = jax.vjp(equilibrium.f, theta, inputs, solution.value)

        # Horner's scheme for the sum: u <- v + ((1 - damping) I + damping J^T) u.
        def step(_: Array, u: PyTree) -> PyTree:
            return _tree.add(v, _tree.relax(u, vjp(u)[2], self.damping))

        u = lax.fori_loop(1, self.steps, step, v)
        factor = jnp.asarray(self.damping)
        theta_bar, inputs_bar, _ = vjp(jax.tree.map(lambda w: factor.astype(w.dtype) * w, u))
        return theta_bar, inputs_bar, None

    def _unrolled(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        solution: Solution,
        v: PyTree,
        controls: Controls,
    ) -> tuple[PyTree, PyTree, None]:
        del controls

        def unroll(theta: PyTree, inputs: PyTree) -> PyTree:
            def step(z: PyTree, _: None) -> tuple[PyTree, None]:
                return _tree.relax(z, equilibrium.f(theta, inputs, z), self.damping), None

            return lax.scan(step, solution.value, None, length=self.steps)[0]

        _, vjp = jax.vjp(unroll, theta, inputs)
        return (*vjp(v), None)


def pull_back_one_step(
    equilibrium: Equilibrium,
    theta: PyTree,
    inputs: PyTree,
    solution: Solution,
    u: PyTree,
    controls: Controls,
) -> tuple[PyTree, PyTree, None]:
    """``u^T df/dtheta`` and ``u^T df/dinputs`` at the solution; see ``base.PullBack``."""
    del controls
    z = solution.value
    _, vjp = jax.vjp(lambda theta, inputs: equilibrium.f(theta, inputs, z), theta, inputs)
    return (*vjp(u), None)
