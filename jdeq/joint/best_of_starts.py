"""Several starts a problem, the best kept."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdeq import _options
from jdeq._shards import automatic, vary_alike
from jdeq.adjoints import base
from jdeq.adjoints.base import JointAdjoint
from jdeq.adjoints.state_implicit import StateImplicit
from jdeq.equilibrium import Controls
from jdeq.joint.augmented import AugmentedState
from jdeq.joint.method import JointMethod
from jdeq.joint.polished import Polished
from jdeq.joint.problem import InputProblem, purify
from jdeq.joint.run import Found, Given, JointRun, LoopOptions
from jdeq.joint.solve import check_arguments
from jdeq.solution import Result, Solution, constant_but_value, places

PyTree = Any


class StartsAux(NamedTuple):
    """Further outputs of ``best_of_starts``, constants to autodiff.

    Attributes:
        objective: the objective at the returned ``(z, x)``, ``[B]``.
        start: which start it comes from, int32 ``[B]``.
        objectives: the objective that each start arrived at, ``[S, B]``.
    """

    objective: Array
    start: Array
    objectives: Array


def best_of_starts(
    problem: InputProblem,
    params: PyTree,
    target: PyTree,
    x0: PyTree,
    z0: PyTree,
    *,
    data: PyTree = None,
    mu0: PyTree = None,
    method: JointMethod | None = None,
    adjoint: JointAdjoint | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-8,
    max_steps: int = 300,
    step_budget: int | Array | None = None,
    history: bool = False,
    backward_probe: Array | None = None,
    compaction: int = 0,
    patience: int | None = None,
) -> Solution:
    """``joint_solve`` from several first inputs a problem, of which the best solution is kept.

    All ``S B`` solves run as one batch. Of each problem's S solutions the one of lowest objective
    is returned among those that converged, else among those that did not fail, else of all. The
    choice is a constant to autodiff, and only what was chosen is differentiated: gradients, and
    ``backward_probe``, cost what those of B problems do. For the envelope gradient of the best,
    hand its ``z``, ``x`` and ``mu`` to ``input_value`` as a start.

    Args:
        problem: see ``joint_solve``, as all arguments that are not described here.
        params: see ``joint_solve``.
        target: every leaf ``[B, ...]``; shared by the starts, as ``data``, ``z0`` and ``mu0`` are.
        x0: first inputs, every leaf ``[S, B, ...]``.
        z0: first state, every leaf ``[B, ...]``.
        data: see ``joint_solve``.
        mu0: see ``joint_solve``.
        method: see ``joint_solve``.
        adjoint: see ``joint_solve``.
        rtol: see ``joint_solve``.
        atol: see ``joint_solve``.
        max_steps: see ``joint_solve``.
        step_budget: see ``joint_solve``.
        history: whether to keep residuals and objective of the iterations that led to the best.
        backward_probe: zeros ``[B, 3]``; see ``joint_solve``.
        compaction: see ``joint_solve``; it pays where some starts arrive much sooner than others.
        patience: see ``joint_solve``.

    Returns:
        The ``Solution`` of B problems. ``steps`` counts the evaluations of all starts of a problem
        together, and ``aux`` is a ``StartsAux``.

    Raises:
        TypeError: as ``joint_solve``.
        ValueError: as ``joint_solve``, or if ``x0`` has no axis of starts.
    """
    owner = "best_of_starts"
    method = Polished() if method is None else method
    adjoint = StateImplicit() if adjoint is None else adjoint
    _options.check_instance(owner, "method", method, JointMethod, "jdeq.joint.Descent()")
    _options.check_instance(
        owner, "adjoint", adjoint, JointAdjoint, "jdeq.adjoints.StateImplicit()"
    )
    _options.check_switch(owner, "history", history)
    count = _options.problem_count(owner, "z0", z0)
    _check_starts(owner, x0, count)
    if backward_probe is not None:
        _options.check_probe(owner, backward_probe, count)
    controls = Controls(rtol, atol, step_budget)
    loop = LoopOptions(max_steps, history, compaction, patience)
    # Of starts that are spread over devices none can be taken out here.
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), x0)
    params, target, rest, start = check_arguments(
        owner, problem, params, target, one, z0, data, mu0, controls, loop
    )
    return _best_of_starts(
        (params, target, rest, start._replace(x=None)),
        x0,
        controls,
        backward_probe,
        problem=problem,
        method=method,
        adjoint=adjoint,
        loop=loop,
    )


def _places(first: Any, second: Any) -> Solution:
    """See ``jdeq._shards.automatic``."""
    return dataclasses.replace(places(first, second), aux=StartsAux(first, first, second))


@functools.partial(jax.jit, static_argnames=("problem", "method", "adjoint", "loop"))
@automatic(_places)
def _best_of_starts(
    arguments: tuple[PyTree, PyTree, tuple, AugmentedState],
    x0: PyTree,
    controls: Controls,
    probe: Array | None,
    *,
    problem: InputProblem,
    method: JointMethod,
    adjoint: JointAdjoint,
    loop: LoopOptions,
) -> Solution:
    """One compiled program a problem, set of options and shapes, also for eager calls."""
    arguments, x0, controls, probe = vary_alike((arguments, x0, controls, probe))
    params, target, rest, start = arguments
    start = start._replace(x=x0)
    starts, count = jax.tree.leaves(x0)[0].shape[:2]
    first = jax.tree.map(lambda leaf: leaf[0], x0)
    pure, theta = purify("best_of_starts", problem, params, target, first, start.z, rest)
    run = JointRun(pure, method, loop)
    given = Given(theta, target, rest)

    fixed, start = jax.lax.stop_gradient((given, start))
    owner = jnp.tile(jnp.arange(count), starts)
    target, rest, z, mu = _take(owner, (fixed.target, fixed.rest, start.z, start.mu))
    x = jax.tree.map(lambda leaf: leaf.reshape(starts * count, *leaf.shape[2:]), start.x)
    flat_start = AugmentedState(z, x, mu)
    flat = run(Given(fixed.theta, target, rest), flat_start, controls)

    objectives = flat.aux.objective.reshape(starts, count)
    winner = _winner(objectives, flat.result.reshape(starts, count))
    chosen = winner * count + jnp.arange(count)
    found = _take(chosen, dataclasses.replace(flat, history=None))
    found = dataclasses.replace(
        found,
        steps=jnp.sum(flat.steps.reshape(starts, count), axis=0, dtype=jnp.int32),
        history=jax.tree.map(lambda rows: rows[:, chosen], flat.history),
        aux=StartsAux(found.aux.objective, winner, objectives),
    )
    best_start = _take(chosen, flat_start)
    solution = adjoint.solve(
        Found(run), pure.cell, loop.max_steps, given, (best_start, found), controls, probe
    )
    return constant_but_value(solution)


def _winner(objectives: Array, results: Array) -> Array:
    """The start whose solution is kept, int32 ``[B]``; objectives and results are ``[S, B]``."""
    rank = jnp.where(results == Result.converged, 0, jnp.where(base.failed(results), 2, 1))
    competes = rank == jnp.min(rank, axis=0)
    return jnp.argmin(jnp.where(competes, objectives, jnp.inf), axis=0).astype(jnp.int32)


def _take(index: Array, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _check_starts(owner: str, x0: PyTree, count: int) -> None:
    """Refuses first inputs whose leaves do not all have shape ``[S, count, ...]``."""
    leaves = jax.tree_util.tree_leaves_with_path(x0)
    starts = np.shape(leaves[0][1])[:1] if leaves else ()
    for path, leaf in leaves:
        shape = np.shape(leaf)
        if shape[:1] != starts or shape[1:2] != (count,) or shape[0] == 0:
            raise ValueError(
                f"{owner}: x0{jax.tree_util.keystr(path)} has shape {shape}, but its first axis is "
                f"the starts and its second the {count} problems of z0; stack S first inputs, "
                f"for example with jnp.stack."
            )
