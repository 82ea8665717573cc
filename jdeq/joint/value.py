"""The optimal value of an input problem, differentiable by the envelope theorem."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _options, _tree
from jdeq.adjoints import base
from jdeq.equilibrium import Controls
from jdeq.joint.augmented import AugmentedState
from jdeq.joint.method import JointMethod
from jdeq.joint.polished import Polished
from jdeq.joint.problem import InputProblem, PureProblem, purify
from jdeq.joint.run import Given, JointRun, projection
from jdeq.joint.solve import check_arguments
from jdeq.solution import Solution

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
) -> tuple[Array, Solution]:
    """The optimal objective ``V = l(z*, x*)`` of each problem, by a joint solve.

    By the envelope theorem its gradient needs no backward solve:

        dV/dparams = dl/dparams + mu^T df/dparams

    and likewise for ``target`` and ``data``, where a constraint set that depends on ``data`` (a
    radius) adds ``g^T dP(x - g)/ddata``, ``g`` being the gradient of the objective in x. This is
    exact at a KKT point and off by the order of the residuals elsewhere: look at
    ``Solution.residual``. The values themselves are ``l`` at the
    returned iterate. A second derivative would need how ``(z*, x*, mu)`` move with the parameters,
    which this rule leaves out, and is refused.

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

    Returns:
        Values ``[B]``, NaN for a problem of which no evaluation was finite, and the ``Solution``,
        a constant to autodiff.

    Raises:
        TypeError: as ``joint_solve``.
        ValueError: as ``joint_solve``.
        NotImplementedError: when differentiated twice.
    """
    method = Polished() if method is None else method
    _options.check_instance("input_value", "method", method, JointMethod, "jdeq.joint.Descent()")
    controls = Controls(rtol, atol, step_budget)
    arguments = check_arguments(
        "input_value", problem, params, target, x0, z0, data, mu0, controls, max_steps, history
    )
    return _input_value(
        arguments, controls, problem=problem, method=method, max_steps=max_steps, history=history
    )


@functools.partial(jax.jit, static_argnames=("problem", "method", "max_steps", "history"))
def _input_value(
    arguments: tuple[PyTree, PyTree, tuple, AugmentedState],
    controls: Controls,
    *,
    problem: InputProblem,
    method: JointMethod,
    max_steps: int,
    history: bool | Callable[[AugmentedState], PyTree],
) -> tuple[Array, Solution]:
    params, target, rest, start = arguments
    pure, theta = purify("input_value", problem, params, target, start.x, start.z, rest)
    run = JointRun(pure, method, max_steps, history)
    start = jax.lax.stop_gradient(start)
    values, solution = _with_envelope(run, pure, Given(theta, target, rest), start, controls)
    return values, jax.lax.stop_gradient(solution)


def _with_envelope(
    run: Callable[[Given, AugmentedState, Controls], Solution],
    pure: PureProblem,
    given: Given,
    start: AugmentedState,
    controls: Controls,
) -> tuple[Array, Solution]:
    """Runs the solve with the envelope rule attached to its objective."""

    @jax.custom_vjp
    def value(given, start, controls):
        solution = run(given, start, controls)
        objective = solution.aux.objective
        return jnp.where(jnp.isfinite(objective), objective, jnp.nan), solution

    def forward(given, start, controls):
        values, solution = value(given, start, controls)
        state = _refuse_second_derivative(solution.value)
        return (values, solution), (given, state, solution.result)

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
    slope = _tree.norm(x_bar)
    # Steps longer than x, and away from zero if g is zero, do not end where norms have no slope.
    length = (1 + _tree.norm(x)) / jnp.where(slope > 0, slope, 1)
    step = _tree.scale(-jnp.sign(weight).astype(length.dtype) * length, x_bar)
    away = jax.tree.map(lambda leaf: jnp.where(leaf < 0, -1, 1).astype(leaf.dtype), x)
    outside = _tree.add(x, _tree.select(slope > 0, step, away))
    _, pull_back = jax.vjp(lambda given: projection(pure, given)(outside), given)
    return pull_back(x_bar)[0]


def _add_cotangents(a: Any, b: Any) -> Any:
    return a if a.dtype == jax.dtypes.float0 else a + b


@jax.custom_jvp
def _refuse_second_derivative(state: AugmentedState) -> AugmentedState:
    return state


@_refuse_second_derivative.defjvp
def _refuse(primals: tuple, tangents: tuple) -> tuple[AugmentedState, AugmentedState]:
    raise NotImplementedError(
        "input_value: a second derivative was asked for, but the envelope rule holds the solution "
        "constant, so its derivative would miss how the solution moves with the parameters; "
        "differentiate once."
    )
