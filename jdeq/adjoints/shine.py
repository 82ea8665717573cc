"""The forward solver's estimate of the inverse Jacobian in place of a backward solve."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree
from jdeq.adjoints import base
from jdeq.adjoints.implicit import Implicit
from jdeq.adjoints.phantom import pull_back_one_step
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.solution import Solution
from jdeq.solvers.base import InverseEstimator

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Shine:
    """SHINE: the inverse estimate of the forward pass shared with the backward (Ramzi et al. 2022).

    For a cotangent ``v`` the implicit gradient is ``u^T df/dtheta`` with
    ``u = (I - df/dz)^{-T} v``. A quasi-Newton solver leaves an estimate of that inverse behind,
    and here ``u`` is the estimate, transposed, times ``v``: no backward solve takes place, and the
    cost is that of ``JacobianFree`` and a pass over the solver's window. Solvers: ``Broyden``, of
    either kind, and ``Anderson``, of either type.

    The gradient is biased, by as much as the estimate is wrong in the direction ``v``, which the
    forward solve knew nothing of: an estimate knows only directions in which the iteration moved,
    and is ``mixing`` times the identity elsewhere. Anderson's is exact for an affine map in whose
    window there are as many independent steps as dimensions. Broyden's is not even then, as an
    update keeps to the newest step alone, and it is emptied whenever its window is full: give it at
    least as many slots as steps. Relative errors in 5 dimensions, both solved to rounding: linear
    contraction of norm 0.7, Jacobian-free 0.43, Broyden 0.16 to 0.21, Anderson 0; dense tanh cell,
    Jacobian-free 0.31, Broyden 0.09, Anderson 4e-4. Loose solves know less: at a tolerance of 0.1
    the latter two are 0.19 and 0.23. Reverse mode only; in a second derivative the estimate is a
    constant.

    Attributes:
        fallback: a problem whose ``||u||`` exceeds this times ``||v||``, or is not finite, takes
            the Jacobian-free ``u = v`` instead, at least 0; None trusts every finite estimate. The
            default, 1.3, is what the authors' published code compares these norms by. It trusts
            estimates that hardly stretch ``v``, as those of strongly contractive cells; where the
            map contracts slowly the exact ``u`` itself is longer, and None, a larger ratio or
            ``refine`` are needed.
        refine: steps of the forward solver on ``u = (df/dz)^T u + v``, starting from the estimate,
            at least 0. They end at the forward tolerance and take one more vector-Jacobian product
            than there are steps; the ``u`` of least residual is used. ``backward_probe`` reports
            that solve.

    Raises:
        ValueError: if an option is out of range.
    """

    fallback: float | None = 1.3
    refine: int = 0

    def __post_init__(self) -> None:
        if self.fallback is not None:
            _options.check_nonnegative("Shine", "fallback", self.fallback)
        _options.check_count("Shine", "refine", self.refine, least=0)

    def solve(
        self,
        equilibrium: Equilibrium,
        theta: PyTree,
        inputs: PyTree,
        z0: PyTree,
        controls: Controls,
        probe: Array | None,
    ) -> Solution:
        """See ``jdeq.adjoints.Adjoint.solve``; there is something to probe only with ``refine``."""
        solver = equilibrium.options.solver
        if not isinstance(solver, InverseEstimator):
            raise ValueError(
                f"Shine: the solver is {solver!r}, which keeps no estimate of an inverse Jacobian, "
                f"but one that does is expected; take jdeq.solvers.Broyden() or Anderson(), or "
                f"another gradient, jdeq.adjoints.JacobianFree() for one."
            )
        if self.refine == 0:
            base.refuse_probe("Shine(refine=0)", probe)
        asked = controls.memory is not None
        controls = controls if asked else controls._replace(memory=solver.init(z0))
        pull_back = partial(self._pull_back, equilibrium, solver)
        solution = base.attach(pull_back, equilibrium, theta, inputs, z0, controls, probe)
        if asked:
            return solution
        return dataclasses.replace(solution, aux=solution.aux._replace(memory=None))

    def _pull_back(
        self,
        equilibrium: Equilibrium,
        solver: InverseEstimator,
        theta: PyTree,
        inputs: PyTree,
        solution: Solution,
        v: PyTree,
        controls: Controls,
    ) -> tuple[PyTree, PyTree, Solution | None]:
        bad = base.failed(solution.result)
        memory = jax.lax.stop_gradient(base.donate(bad, solution.aux.memory))
        unit, direction = _tree.in_range(v)
        u = solver.transposed_inverse(memory, direction)
        limit = jnp.inf if self.fallback is None else self.fallback * _tree.norm(direction)
        size = _tree.norm(u)
        u = _tree.select(jnp.isfinite(size) & (size <= limit), _tree.scale(unit, u), v)
        if self.refine == 0:
            return pull_back_one_step(equilibrium, theta, inputs, solution, u, controls)
        # The steps move between one more evaluation than there are of them.
        implicit = Implicit(max_steps=self.refine + 1)
        return implicit.pull_back(
            equilibrium, theta, inputs, solution, v, controls, start=jax.lax.stop_gradient(u)
        )
