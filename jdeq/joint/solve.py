"""The joint solve: inference and input optimisation as one augmented fixed point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jdeq import _options, _tree
from jdeq._shards import automatic, vary_alike
from jdeq.adjoints.base import JointAdjoint
from jdeq.adjoints.state_implicit import StateImplicit
from jdeq.equilibrium import Controls
from jdeq.joint.augmented import AugmentedState
from jdeq.joint.method import JointMethod
from jdeq.joint.polished import Polished
from jdeq.joint.problem import InputProblem, purify
from jdeq.joint.run import Given, JointRun, LoopOptions
from jdeq.solution import Solution, constant_but_value, places

PyTree = Any


def joint_solve(
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
    history: bool | Callable[[AugmentedState], PyTree] = False,
    backward_probe: Array | None = None,
    compaction: int = 0,
    patience: int | None = None,
) -> Solution:
    """Minimises each problem's objective over its input, together with the equilibrium.

    One iteration costs one evaluation of the cell, one vector-Jacobian product of it and one
    gradient of the objective. A problem is done when

        ||f - z||  <= atol + rtol ||f||
        ||A - mu|| <= atol + rtol ||A||
        stationarity <= atol + rtol

    with ``A = (df/dz)^T mu + dl/dz`` and the stationarity of ``KKTResidual``. Otherwise the lowest
    objective among the iterates is returned whose state residual is within 1.3 of the lowest so
    far, or of its tolerance if that is larger. An iterate passed over for a lower state residual
    does not come back, and the first ten set no standard, since x has hardly moved from where the
    state may be at equilibrium already.

    Args:
        problem: cell, objective and projection.
        params: what all problems share, any pytree.
        target: what the objective compares with, every leaf ``[B, ...]``.
        x0: first input, every leaf ``[B, ...]`` of a floating dtype; projected first. Its
            gradient is zero.
        z0: first state, every leaf ``[B, ...]`` of a floating dtype. Zero gradient.
        data: constants of each problem, every leaf ``[B, ...]``, passed last to cell, objective
            and projection when given.
        mu0: first adjoint, like ``z0``; None is zero.
        method: ``jdeq.joint.Polished()`` (default), ``Descent(optimizer)`` or ``Accelerated(...)``.
        adjoint: gradient of the solution: ``jdeq.adjoints.StateImplicit()`` (default), to which
            ``value.x`` and ``value.mu`` are constants, or ``jdeq.adjoints.KKTImplicit()``, to which
            they are not.
        rtol: relative tolerance, at least 0; may be traced.
        atol: absolute tolerance, at least 0; may be traced.
        max_steps: limit on the iterations, which decaying schedules span, at least 1.
        step_budget: further limit that may be traced: the solve is that of ``max_steps`` as small,
            and decaying schedules span it, but nothing compiles anew when it changes. An optimiser
            of one's own keeps its own schedule.
        history: whether to keep residuals and objective of every iteration; a function of the
            ``AugmentedState`` is recorded besides.
        backward_probe: zeros ``[B, 3]``; the cotangent of this argument is (residual, steps,
            result) of each problem's backward solve.
        compaction: number of smaller sizes that the batch may shrink to, forward and backward, as
            problems finish; see ``jdeq.deq``.
        patience: iterations without a lower objective (by a thousandth) after which a problem
            stops, its result ``stagnated``; None waits for the tolerance or the limit, as
            schedules that decay over ``max_steps`` ask for.

    Returns:
        The ``Solution``: ``value`` an ``AugmentedState``, ``residual`` a ``KKTResidual``, ``aux`` a
        ``JointAux``.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if an option is out of range, problem axes differ, or a function of the problem
            returns the wrong structure, shape or dtype.
    """
    method = Polished() if method is None else method
    adjoint = StateImplicit() if adjoint is None else adjoint
    _options.check_instance("joint_solve", "method", method, JointMethod, "jdeq.joint.Descent()")
    _options.check_instance(
        "joint_solve", "adjoint", adjoint, JointAdjoint, "jdeq.adjoints.StateImplicit()"
    )
    controls = Controls(rtol, atol, step_budget)
    loop = LoopOptions(max_steps, history, compaction, patience)
    arguments = check_arguments(
        "joint_solve", problem, params, target, x0, z0, data, mu0, controls, loop
    )
    if backward_probe is not None:
        _options.check_probe("joint_solve", backward_probe, _tree.problem_count(arguments[3].z))
    return _joint_solve(
        arguments,
        controls,
        backward_probe,
        problem=problem,
        method=method,
        adjoint=adjoint,
        loop=loop,
    )


def check_arguments(
    owner: str,
    problem: InputProblem,
    params: PyTree,
    target: PyTree,
    x0: PyTree,
    z0: PyTree,
    data: PyTree,
    mu0: PyTree,
    controls: Controls,
    loop: LoopOptions,
) -> tuple[PyTree, PyTree, tuple, AugmentedState]:
    """Refuses what can be refused before tracing.

    Returns:
        ``(params, target, rest, start)`` with ``rest`` ``()`` or ``(data,)``.
    """
    if not isinstance(problem, InputProblem):
        raise TypeError(
            f"{owner}: problem={problem!r} was given, but a jdeq.InputProblem(cell, objective) is "
            f"expected."
        )
    _options.check_tolerance(owner, "rtol", controls.rtol)
    _options.check_tolerance(owner, "atol", controls.atol)
    _options.check_budget(owner, controls.budget)
    loop.check(owner)
    _options.check_arrays(owner, "params", params)
    count = _options.problem_count(owner, "z0", z0)
    _options.check_batch(owner, "z0", count, x0=x0, target=target, data=data)
    _options.check_inexact(owner, "z0", z0)
    _options.check_inexact(owner, "x0", x0)
    if mu0 is None:
        mu0 = _tree.zeros_like(z0)
    _options.check_same(owner, "mu0", mu0, z0, "the adjoint has the shape of the state.")
    rest = () if data is None else (data,)
    return params, target, rest, AugmentedState(z0, x0, mu0)


@functools.partial(jax.jit, static_argnames=("problem", "method", "adjoint", "loop"))
@automatic(places)
def _joint_solve(
    arguments: tuple[PyTree, PyTree, tuple, AugmentedState],
    controls: Controls,
    probe: Array | None,
    *,
    problem: InputProblem,
    method: JointMethod,
    adjoint: JointAdjoint,
    loop: LoopOptions,
) -> Solution:
    """One compiled program a problem, set of options and shapes, also for eager calls."""
    arguments, controls, probe = vary_alike((arguments, controls, probe))
    params, target, rest, start = arguments
    pure, theta = purify("joint_solve", problem, params, target, start.x, start.z, rest)
    run = JointRun(pure, method, loop)
    given = Given(theta, target, rest)
    start = jax.lax.stop_gradient(start)
    solution = adjoint.solve(run, pure.cell, loop.max_steps, given, start, controls, probe)
    return constant_but_value(solution)
