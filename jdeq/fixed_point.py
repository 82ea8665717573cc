"""Differentiable fixed points: ``fixed_point`` of a map, ``deq`` of a cell."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jdeq import _closures, _options
from jdeq.adjoints.base import Adjoint
from jdeq.adjoints.implicit import Implicit
from jdeq.equilibrium import Controls, Equilibrium
from jdeq.solution import Solution, constant_but_value
from jdeq.solvers.anderson import Anderson
from jdeq.solvers.base import Solver

PyTree = Any


def fixed_point(
    f: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    z0: PyTree,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    max_steps: int = 100,
    step_budget: int | Array | None = None,
    history: bool | Callable[[PyTree], PyTree] = False,
    backward_probe: Array | None = None,
) -> Solution:
    """Finds ``z* = f(params, z*)`` for a batch of problems, differentiably in ``params``.

    A problem is done when ``||f(z) - z|| <= atol + rtol ||f(z)||``, the 2-norm running over all its
    leaves. It then keeps its value while others go on. Nothing is raised for a problem that fails:
    ``Solution.result`` says so.

    Args:
        f: ``f(params, z) -> z``, pure and deterministic. Arrays that it captures get gradients as
            ``params`` do. As with ``jax.jit``, a function called again is not traced again.
        params: any pytree; never split by problem.
        z0: start, every leaf ``[B, ...]`` of a floating dtype, B the number of problems. Its
            gradient is zero.
        solver: one of ``jdeq.solvers``; default ``Anderson()``.
        adjoint: one of ``jdeq.adjoints``; default ``Implicit()``.
        rtol: relative tolerance, at least 0; may be traced.
        atol: absolute tolerance, at least 0; may be traced.
        max_steps: limit on the steps, at least 1.
        step_budget: further limit that may be traced, so that it changes without recompiling.
        history: whether to keep the residuals of every step; a function of the iterate is recorded
            besides.
        backward_probe: zeros ``[B, 3]``; the cotangent of this argument is (residual, steps,
            result) of each problem's backward solve.

    Returns:
        The ``Solution``; ``value`` is like ``z0``, ``residual`` is ``||f(z) - z||``, ``[B]``.

    Raises:
        TypeError: if an option is of the wrong kind, or ``f`` changes the dtype of ``z``.
        ValueError: if an option is out of range, or ``f`` changes the structure or shape of ``z``.
    """
    return _entry(
        "fixed_point",
        "f",
        f,
        _call_map,
        (params, (), z0),
        Controls(rtol, atol, step_budget),
        backward_probe,
        solver=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        history=history,
    )


def deq(
    cell: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    z0: PyTree,
    *,
    data: PyTree = None,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    max_steps: int = 100,
    step_budget: int | Array | None = None,
    history: bool | Callable[[PyTree], PyTree] = False,
    backward_probe: Array | None = None,
) -> Solution:
    """Equilibrium ``z* = cell(params, z*, x[, data])`` of a cell (Bai, Kolter, Koltun 2019).

    Like ``fixed_point``, and differentiable in ``params``, ``x`` and ``data``. Since inputs are
    known to belong to one problem each, a problem with bad inputs harms no other's gradient.

    Args:
        cell: ``cell(params, z, x) -> z``, or with ``data`` as a fourth argument when it is given;
            pure, deterministic, and independent across problems.
        params: what all problems share, any pytree.
        x: inputs, every leaf ``[B, ...]``.
        z0: start, every leaf ``[B, ...]`` of a floating dtype. Its gradient is zero.
        data: further constants of each problem (masks, radii, keys), every leaf ``[B, ...]``.
        solver: see ``fixed_point``.
        adjoint: see ``fixed_point``.
        rtol: see ``fixed_point``.
        atol: see ``fixed_point``.
        max_steps: see ``fixed_point``.
        step_budget: see ``fixed_point``.
        history: see ``fixed_point``.
        backward_probe: see ``fixed_point``.

    Returns:
        The ``Solution``; ``value`` is like ``z0``.

    Raises:
        TypeError: as ``fixed_point``.
        ValueError: as ``fixed_point``, or if the problem axes of ``x``, ``z0`` and ``data`` differ.
    """
    count = _options.problem_count("deq", "z0", z0)
    _options.check_batch("deq", "z0", count, x=x, data=data)
    inputs = (x,) if data is None else (x, data)
    return _entry(
        "deq",
        "cell",
        cell,
        _call_cell,
        (params, inputs, z0),
        Controls(rtol, atol, step_budget),
        backward_probe,
        solver=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        history=history,
    )


def _call_map(f: Callable, params: PyTree, inputs: tuple[()], z: PyTree) -> PyTree:
    del inputs
    return f(params, z)


def _call_cell(cell: Callable, params: PyTree, inputs: tuple, z: PyTree) -> PyTree:
    return cell(params, z, *inputs)


def _entry(
    owner: str,
    name: str,
    function: Callable,
    call: Callable,
    arguments: tuple[PyTree, PyTree, PyTree],
    controls: Controls,
    probe: Array | None,
    *,
    solver: Solver | None,
    adjoint: Adjoint | None,
    max_steps: int,
    history: bool | Callable[[PyTree], PyTree],
) -> Solution:
    """Checks what can be checked without tracing, and enters the compiled solve."""
    solver = Anderson() if solver is None else solver
    adjoint = Implicit() if adjoint is None else adjoint
    _options.check_function(owner, name, function)
    _options.check_instance(owner, "solver", solver, Solver, "jdeq.solvers.Anderson()")
    _options.check_instance(owner, "adjoint", adjoint, Adjoint, "jdeq.adjoints.Implicit()")
    _options.check_tolerance(owner, "rtol", controls.rtol)
    _options.check_tolerance(owner, "atol", controls.atol)
    _options.check_count(owner, "max_steps", max_steps)
    _options.check_budget(owner, controls.budget)
    _options.check_history(owner, history)
    _options.check_arrays(owner, "params", arguments[0])
    count = _options.problem_count(owner, "z0", arguments[2])
    _options.check_inexact(owner, "z0", arguments[2])
    if probe is not None:
        _options.check_probe(owner, probe, count)
    return _solve(
        arguments,
        controls,
        probe,
        owner=owner,
        name=name,
        function=function,
        call=call,
        solver=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        history=history,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "owner",
        "name",
        "function",
        "call",
        "solver",
        "adjoint",
        "max_steps",
        "history",
    ),
)
def _solve(
    arguments: tuple[PyTree, PyTree, PyTree],
    controls: Controls,
    probe: Array | None,
    *,
    owner: str,
    name: str,
    function: Callable,
    call: Callable,
    solver: Solver,
    adjoint: Adjoint,
    max_steps: int,
    history: bool | Callable[[PyTree], PyTree],
) -> Solution:
    """One compiled program a function, set of options and shapes, also for eager calls."""
    params, inputs, z0 = arguments
    pure, captured = _closures.hoist(
        owner, name, functools.partial(call, function), params, inputs, z0
    )

    def f(theta: PyTree, inputs: PyTree, z: PyTree) -> PyTree:
        params, captured = theta
        return pure(captured, params, inputs, z)

    theta = (params, captured)
    z0 = jax.lax.stop_gradient(z0)
    _options.check_same(
        owner,
        f"the output of {name}",
        jax.eval_shape(f, theta, inputs, z0),
        z0,
        f"{name} must return a state like the one it is given: same structure, shapes and dtypes.",
    )
    equilibrium = Equilibrium(f, solver, max_steps, history)
    return constant_but_value(adjoint.solve(equilibrium, theta, inputs, z0, controls, probe))
