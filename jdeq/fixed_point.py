"""Differentiable fixed points: ``fixed_point`` of a map, ``deq`` of a cell."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _closures, _options, _tree
from jdeq._shards import automatic, vary_alike
from jdeq.adjoints import base
from jdeq.adjoints.base import Adjoint
from jdeq.adjoints.implicit import Implicit
from jdeq.equilibrium import Controls, Equilibrium, RunOptions
from jdeq.iterate import Fold
from jdeq.solution import Solution, constant_but_value, places
from jdeq.solvers.anderson import Anderson
from jdeq.solvers.base import Solver

PyTree = Any


class EquilibriumAux(NamedTuple):
    """Further outputs of an equilibrium solve, each None unless asked for.

    Attributes:
        cell: what the cell returned besides the state, at the solution.
        memory: the solver's memory, to pass to the next call; a constant to autodiff.
        folded: the last value of the fold; a constant to autodiff.
    """

    cell: PyTree
    memory: PyTree
    folded: PyTree


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
    has_aux: bool = False,
    memory: PyTree = None,
    fold: Fold | None = None,
) -> Solution:
    """Finds ``z* = f(params, z*)`` for a batch of problems, differentiably in ``params``.

    A problem is done when ``||f(z) - z|| <= atol + rtol ||f(z)||``, the 2-norm running over all its
    leaves. It then keeps its value while others go on. Nothing is raised for a problem that fails:
    ``Solution.result`` says so.

    Args:
        f: ``f(params, z) -> z``, pure and deterministic. Arrays that it captures get gradients as
            ``params`` do, except inside ``jax.shard_map`` and on meshes with explicit axes, where
            JAX refuses them: pass them there. As with ``jax.jit``, a function called again is not
            traced again.
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
        has_aux: whether ``f`` returns ``(z, aux)``, every leaf of aux ``[B, ...]``. Its value at
            the solution is ``Solution.aux.cell``, differentiable, NaN (zero if it is no
            floating-point number) for a problem that diverged or was not finite. It takes one more
            evaluation, which ``steps`` does not count.
        memory: the solver's memory to go on with: ``solver.init(z0)`` at first, then
            ``Solution.aux.memory`` of the last call. A solve near the last one so starts with its
            estimate of the Jacobian. None starts anew, and returns none.
        fold: ``jdeq.Fold(update, start)``, a running value ``update(value, z, k) -> value`` over
            each problem's iterates up to its last, every leaf ``[B, ...]``; its last value is
            ``Solution.aux.folded``.

    Returns:
        The ``Solution``; ``value`` is like ``z0``, ``residual`` is ``||f(z) - z||``, ``[B]``, and
        ``aux`` an ``EquilibriumAux``, or None if nothing further was asked for.

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
        Controls(rtol, atol, step_budget, memory, getattr(fold, "start", None)),
        backward_probe,
        solver=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        history=history,
        has_aux=has_aux,
        fold=fold,
        compaction=0,
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
    has_aux: bool = False,
    memory: PyTree = None,
    fold: Fold | None = None,
    compaction: int = 0,
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
        has_aux: see ``fixed_point``.
        memory: see ``fixed_point``.
        fold: see ``fixed_point``.
        compaction: number of smaller sizes that the batch may shrink to, forward and backward:
            once three quarters, a half, three eighths, a quarter, ... of the problems go on, the
            others leave the computation. 0, the default, never does; 4 or so pay where steps
            differ much between problems and a step costs more than entering a loop. Each size is
            one more compiled loop. Answers agree within the tolerance, not bit for bit. Not for
            use under ``vmap``; under ``shard_map`` each shard has its own.

    Returns:
        The ``Solution``; ``value`` is like ``z0``, ``aux`` as for ``fixed_point``.

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
        Controls(rtol, atol, step_budget, memory, getattr(fold, "start", None)),
        backward_probe,
        solver=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        history=history,
        has_aux=has_aux,
        fold=fold,
        compaction=compaction,
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
    has_aux: bool,
    fold: Fold | None,
    compaction: int,
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
    _options.check_compaction(owner, compaction, history)
    _options.check_arrays(owner, "params", arguments[0])
    count = _options.problem_count(owner, "z0", arguments[2])
    _options.check_inexact(owner, "z0", arguments[2])
    if probe is not None:
        _options.check_probe(owner, probe, count)
    if fold is not None:
        _options.check_fold(owner, fold, Fold)
        _options.check_batch(owner, "z0", count, **{"fold.start": fold.start})
    options = RunOptions(
        solver, max_steps, history, None if fold is None else fold.update, compaction
    )
    return _solve(
        arguments,
        controls,
        probe,
        owner=owner,
        name=name,
        function=function,
        call=call,
        adjoint=adjoint,
        options=options,
        has_aux=has_aux,
    )


@functools.partial(
    jax.jit,
    static_argnames=("owner", "name", "function", "call", "adjoint", "options", "has_aux"),
)
@automatic(places)
def _solve(
    arguments: tuple[PyTree, PyTree, PyTree],
    controls: Controls,
    probe: Array | None,
    *,
    owner: str,
    name: str,
    function: Callable,
    call: Callable,
    adjoint: Adjoint,
    options: RunOptions,
    has_aux: bool,
) -> Solution:
    """One compiled program a function, set of options and shapes, also for eager calls."""
    arguments, controls, probe = vary_alike((arguments, controls, probe))
    params, inputs, z0 = arguments
    z0 = jax.lax.stop_gradient(z0)
    controls = jax.lax.stop_gradient(controls)
    pure, captured = _closures.hoist(
        owner, name, functools.partial(call, function), params, inputs, z0
    )
    theta = (params, captured)

    def with_aux(theta: PyTree, inputs: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        params, captured = theta
        out = pure(captured, params, inputs, z)
        return out if has_aux else (out, None)

    out = jax.eval_shape(pure, captured, params, inputs, z0)
    if has_aux:
        _check_pair(owner, name, out)
        _options.check_batch(owner, "z0", _tree.problem_count(z0), aux=out[1])
    _options.check_same(
        owner,
        f"the output of {name}",
        out[0] if has_aux else out,
        z0,
        f"{name} must return a state like the one it is given: same structure, shapes and dtypes.",
    )
    _check_controls(owner, controls, options, z0)
    equilibrium = Equilibrium.of(lambda *arguments: with_aux(*arguments)[0], options)
    solution = adjoint.solve(equilibrium, theta, inputs, z0, controls, probe)
    run = solution.aux
    solution = constant_but_value(solution)
    aux = None
    if has_aux:
        aux = _cell_aux(with_aux, theta, inputs, solution)
    if aux is None and run.memory is None and run.folded is None:
        return dataclasses.replace(solution, aux=None)
    return dataclasses.replace(solution, aux=EquilibriumAux(aux, *run))


def _check_pair(owner: str, name: str, out: PyTree) -> None:
    """Refuses what is not ``(z, aux)``."""
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            f"{owner}: has_aux=True was given, but {name} returned a {type(out).__name__}; return "
            f"(z, aux), or leave has_aux out."
        )


def _check_controls(owner: str, controls: Controls, options: RunOptions, z0: PyTree) -> None:
    """Refuses a memory of another solver or shape, and a fold that changes its value's shape."""
    if controls.memory is not None:
        _options.check_same(
            owner,
            "memory",
            controls.memory,
            jax.eval_shape(options.solver.init, z0),
            "pass solver.init(z0), or Solution.aux.memory of a call with the same solver and z0.",
        )
    if options.fold is not None:
        _options.check_same(
            owner,
            "the output of fold.update",
            jax.eval_shape(options.fold, controls.folded, z0, jnp.zeros((), jnp.int32)),
            controls.folded,
            "a fold must keep the structure, shapes and dtypes of its start.",
        )


def _cell_aux(with_aux: Callable, theta: PyTree, inputs: PyTree, solution: Solution) -> PyTree:
    """What the cell returns besides the state, and where there is no solution, NaN or zero."""
    bad = base.failed(solution.result)
    z, inputs = base.donate(bad, (solution.value, inputs))

    def mark(leaf: Array) -> Array:
        missing = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return jnp.where(_tree.expand(bad, leaf), jnp.asarray(missing, leaf.dtype), leaf)

    return jax.tree.map(mark, with_aux(theta, inputs, z)[1])
