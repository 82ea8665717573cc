"""The optimal value of an input problem, differentiable by the envelope theorem."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree
from jdeq._shards import automatic, vary_alike
from jdeq.adjoints import base
from jdeq.adjoints.kkt_implicit import KKTImplicit
from jdeq.equilibrium import Controls
from jdeq.joint.augmented import AugmentedState
from jdeq.joint.method import JointMethod
from jdeq.joint.polished import Polished
from jdeq.joint.problem import InputProblem, PureProblem, purify
from jdeq.joint.run import Found, Given, JointRun, LoopOptions, projection
from jdeq.joint.solve import check_arguments
from jdeq.solution import Solution, places

PyTree = Any


def input_value(
    problem: InputProblem,
    params: PyTree,
    target: PyTree,
    x0: PyTree,
    z0: PyTree,
    *,
    data: PyTree = None,
    mu0: PyTree = None,
    method: JointMethod | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-8,
    max_steps: int = 300,
    step_budget: int | Array | None = None,
    history: bool | Callable[[AugmentedState], PyTree] = False,
    adjoint: KKTImplicit | None = None,
    compaction: int = 0,
    patience: int | None = None,
) -> tuple[Array, Solution]:
    """The optimal objective ``V = l(z*, x*)`` of each problem, by a joint solve.

    By the envelope theorem its gradient needs no backward solve:

        dV/dparams = dl/dparams + mu^T df/dparams

    and likewise for ``target`` and ``data``, where a constraint set that depends on ``data`` (a
    radius) adds ``g^T dP(x - g)/ddata``, ``g`` being the gradient of the objective in x. This is
    exact at a KKT point and off by the order of the residuals elsewhere: look at
    ``Solution.residual``. The values themselves are ``l`` at the
    returned iterate.

    Second derivatives, in reverse mode, are exact too: ``adjoint`` says how ``(z*, x*, mu)`` move
    with the parameters, at one KKT system a Hessian-vector product,
    ``jax.grad(lambda p: jnp.vdot(jax.grad(loss)(p), v))``. They ask for a tight ``rtol`` and, as
    ``KKTImplicit`` does, for an optimum that is unique and constraints that are not just about to
    become active. The first derivative does not need any of that, and costs what it did.

    Args:
        problem: see ``joint_solve``, as all further arguments.
        params: differentiable.
        target: differentiable.
        x0: zero gradient.
        z0: zero gradient.
        data: differentiable.
        mu0: zero gradient.
        method: see ``joint_solve``.
        rtol: see ``joint_solve``.
        atol: see ``joint_solve``.
        max_steps: see ``joint_solve``.
        step_budget: see ``joint_solve``.
        history: see ``joint_solve``.
        adjoint: the KKT system's solver in second derivatives; default ``KKTImplicit()``.
        compaction: see ``joint_solve``.
        patience: see ``joint_solve``.

    Returns:
        Values ``[B]``, NaN for a problem of which no evaluation was finite, and the ``Solution``,
        a constant to autodiff.

    Raises:
        TypeError: as ``joint_solve``.
        ValueError: as ``joint_solve``.
    """
    method = Polished() if method is None else method
    adjoint = KKTImplicit() if adjoint is None else adjoint
    if not isinstance(adjoint, KKTImplicit):
        raise TypeError(
            f"input_value: adjoint={adjoint!r} was given, but a jdeq.adjoints.KKTImplicit() is "
            f"expected; it serves second derivatives, the first needs no backward solve."
        )
    _options.check_instance("input_value", "method", method, JointMethod, "jdeq.joint.Descent()")
    controls = Controls(rtol, atol, step_budget)
    loop = LoopOptions(max_steps, history, compaction, patience)
    arguments = check_arguments(
        "input_value", problem, params, target, x0, z0, data, mu0, controls, loop
    )
    return _input_value(
        arguments,
        controls,
        problem=problem,
        method=method,
        adjoint=adjoint,
        loop=loop,
    )


@functools.partial(jax.jit, static_argnames=("problem", "method", "adjoint", "loop"))
@automatic(lambda first, second: (first, places(first, second)))
def _input_value(
    arguments: tuple[PyTree, PyTree, tuple, AugmentedState],
    controls: Controls,
    *,
    problem: InputProblem,
    method: JointMethod,
    adjoint: KKTImplicit,
    loop: LoopOptions,
) -> tuple[Array, Solution]:
    arguments, controls = vary_alike((arguments, controls))
    params, target, rest, start = arguments
    pure, theta = purify("input_value", problem, params, target, start.x, start.z, rest)
    run = JointRun(pure, method, loop)
    start = jax.lax.stop_gradient(start)
    values, solution = _with_envelope(run, adjoint, Given(theta, target, rest), start, controls)
    return values, jax.lax.stop_gradient(solution)


def _with_envelope(
    run: JointRun,
    adjoint: KKTImplicit,
    given: Given,
    start: AugmentedState,
    controls: Controls,
) -> tuple[Array, Solution]:
    """Runs the solve with the envelope rule attached to its objective."""
    pure = run.pure

    @jax.custom_vjp
    def value(given, start, controls):
        solution = run(given, start, controls)
        objective = solution.aux.objective
        return jnp.where(jnp.isfinite(objective), objective, jnp.nan), solution

    def forward(given, start, controls):
        values, solution = value(given, start, controls)
        # The same numbers, but they move with what is given when this rule is differentiated.
        found = (start, solution)
        point = adjoint.solve(
            Found(run), pure.cell, run.loop.max_steps, given, found, controls, None
        )
        return (values, solution), (given, point.value, solution.result)

    def backward(saved, cotangent):
        given, state, result = saved
        bad = base.failed(result)
        state, target, rest = base.donate(bad, (state, given.target, given.rest))
        given = Given(given.theta, target, rest)
        weight = base.mask_problems(bad, cotangent[0])
        _, pull_back = jax.vjp(
            lambda given, x: _lagrangian(pure, given, state._replace(x=x)), given, state.x
        )
        given_bar, x_bar = pull_back(weight)
        moved_bar = _through_constraint(pure, given, state.x, x_bar, weight)
        given_bar = jax.tree.map(_add_cotangents, given_bar, moved_bar)
        theta_bar = base.mask_shared(jnp.all(bad), given_bar.theta)
        rest_bar = base.mask_problems(bad, (given_bar.target, given_bar.rest))
        return Given(theta_bar, *rest_bar), None, None

    value.defvjp(forward, backward)
    return value(given, start, controls)


def _lagrangian(pure: PureProblem, given: Given, state: AugmentedState) -> Array:
    """``l + mu . f`` per problem, whose partial derivatives are the envelope gradient."""
    z, x, mu = state
    objective = pure.objective(given.theta, z, x, given.target, given.rest)
    coupling = _tree.dot(mu, pure.cell(given.theta, (x, *given.rest), z))
    return objective + coupling.astype(objective.dtype)


def _through_constraint(
    pure: PureProblem, given: Given, x: PyTree, x_bar: PyTree, weight: Array
) -> Given:
    """Cotangent of ``given`` from the constraint set's dependence on it.

    A KKT point has ``x = P(x - s g)`` for every ``s > 0``. To ``g``, which is normal to the set,
    only the explicit part of the derivative of ``P`` matters: ``dV = g^T dP``.

    Args:
        pure: the problem.
        given: its arguments.
        x: the optimal input.
        x_bar: ``weight g``.
        weight: cotangent of the values, ``[B]``.

    Returns:
        The cotangent.
    """
    slope = _tree.norm(jax.lax.stop_gradient(x_bar))
    # Steps longer than x, and away from zero if g is zero, do not end where norms have no slope.
    # Their length is arbitrary, and so a constant when this is differentiated.
    size = 1 + _tree.norm(jax.lax.stop_gradient(x))
    length = jnp.sign(weight).astype(size.dtype) * size / jnp.where(slope > 0, slope, 1)
    step = _tree.scale(-jax.lax.stop_gradient(length), x_bar)
    away = jax.tree.map(lambda leaf: jnp.where(leaf < 0, -1, 1).astype(leaf.dtype), x)
    outside = _tree.add(x, _tree.select(slope > 0, step, away))
    _, pull_back = jax.vjp(lambda given: projection(pure, given)(outside), given)
    return pull_back(x_bar)[0]


def _add_cotangents(a: Any, b: Any) -> Any:
    return a if a.dtype == jax.dtypes.float0 else a + b
