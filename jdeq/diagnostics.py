"""What a person asks when a joint solve misbehaves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdeq import _advice, _options, _spectrum, _tree
from jdeq._reduced import Range, Reduced, ratio, relative
from jdeq._shards import automatic, vary_alike
from jdeq.equilibrium import Controls
from jdeq.joint import augmented
from jdeq.joint.augmented import AugmentedState, KKTResidual
from jdeq.joint.polished import Polished
from jdeq.joint.problem import InputProblem, PureProblem, purify
from jdeq.joint.run import Given, JointRun, LoopOptions, Units
from jdeq.joint.solve import check_arguments, joint_solve
from jdeq.solution import Solution, places

PyTree = Any

_RELAXATIONS = tuple(k / 10 for k in range(1, 20))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What is known of a solution; every array has one entry a problem, ``[B]``.

    ``print`` shows a table and the advice. What cannot be known of a problem is NaN. In what
    follows ``z*(x)`` is the equilibrium, ``J`` its derivative ``(I - df/dz)^-1 df/dx``, and
    ``h(x) = l(z*(x), x)`` the reduced objective.

    Attributes:
        solution: the solution that was looked at.
        relative: its residuals in the units of their tolerances: ``||f - z|| / ||f||``,
            ``||A - mu|| / ||A||`` with ``A = (df/dz)^T mu + dl/dz``, and the stationarity.
        state_radius: spectral radius of ``df/dz``. Below 1 plain iteration of the state converges,
            by that factor a step in the long run.
        state_relaxation: the w, a multiple of 0.1 in (0, 2), with which ``z + w (f - z)`` converges
            fastest by the eigenvalues found: above 1 where they are positive, below 1 where some
            are negative or complex.
        augmented_radius: spectral radius of the map ``(z, x, mu) -> (f, P(x - a g), A)`` with
            ``a = step_size``. Below 1 the plain joint iteration converges.
        step_size: ``a``.
        kernel_condition: ratio of the largest to the smallest of the ``min(dim x, dim z)`` largest
            eigenvalues of the tangent kernel ``J J^T``; infinite where x has directions that do
            not move the state, to rounding.
        pl_constant: the smallest of those eigenvalues, the local PL* constant of ``x -> z*(x)``: a
            squared distance ``L = ||z*(x) - y||^2 / 2`` has ``||dL/dx||^2 >= 2 pl_constant L``
            nearby, so that gradient descent on x converges linearly (Liu, Zhu, Belkin 2020). Where
            ``dim x < dim z`` that holds for a ``y`` within reach only.
        hessian_smallest: smallest eigenvalue of the Hessian of ``h``, constraints left aside; an
            upper bound where ``dim x > dimension``.
        hessian_largest: largest eigenvalue; a lower bound where ``dim x > dimension``.
        linear_residual: relative residual of the linear solve for mu. The numbers on J and h take
            many more solves with ``I - df/dz`` and its transpose, which have the same spectrum:
            they are no more precise than that.
    """

    solution: Solution
    relative: KKTResidual
    state_radius: Array
    state_relaxation: Array
    augmented_radius: Array
    step_size: Array
    kernel_condition: Array
    pl_constant: Array
    hessian_smallest: Array
    hessian_largest: Array
    linear_residual: Array

    @property
    def hessian_condition(self) -> Array:
        """Largest over smallest eigenvalue of the Hessian of ``h``, infinite without a minimum."""
        return ratio(self.hessian_largest, self.hessian_smallest)

    @property
    def largest_stable_step(self) -> Array:
        """``2 / hessian_largest``: gradient descent on x with a longer step diverges, ``[B]``."""
        curvature = self.hessian_largest
        return jnp.where(curvature <= 0, jnp.inf, 2 / jnp.where(curvature == 0, 1, curvature))

    @property
    def advice(self) -> list[str]:
        """What the numbers say, and what to do about it, one sentence or two each."""
        return _advice.advice(self)

    def __str__(self) -> str:
        """The table and the advice."""
        return _advice.report(self)


def diagnose(
    problem: InputProblem,
    params: PyTree,
    target: PyTree,
    x0: PyTree | Solution,
    z0: PyTree | None = None,
    *,
    data: PyTree = None,
    step_size: float | Array | None = None,
    dimension: int = 20,
    linear_rtol: float = 1e-6,
    key: Array | None = None,
    **solve: Any,
) -> Diagnosis:
    """Looks at a joint solve: residuals, contraction, conditioning, step sizes, advice.

    ``print(jdeq.diagnose(problem, params, target, x0, z0))`` solves and reports;
    ``jdeq.diagnose(problem, params, target, solution)`` reports on a solution that is there.

    It costs ``7 dimension`` Jacobian products for radii and relaxation and ``4 dimension`` linear
    solves, each of them some tens (at most 200) of Jacobian products of the cell: much more than
    the solve itself. A few problems of a batch are usually enough. Memory: ``dimension + 1``
    augmented states, or 41 states.

    Cell and objective must be twice differentiable, in forward mode over reverse; the projection
    once.

    Args:
        problem: see ``joint_solve``.
        params: see ``joint_solve``.
        target: see ``joint_solve``.
        x0: a ``Solution`` of ``joint_solve`` or ``nested_solve``, or a first input.
        z0: first state; only with a first input.
        data: see ``joint_solve``; with a solution, what it was found with.
        step_size: step on x whose joint map is looked at, scalar or ``[B]``: the one in use with
            ``Accelerated`` or plain gradient descent. None is half the largest stable step, or
            where nothing is curved ``(1 + ||x||)^2 / |l|``.
        dimension: of the Krylov spaces in which eigenvalues are looked for; those of the tangent
            kernel and of the Hessian are exact from ``dim x`` on.
        linear_rtol: relative tolerance of the linear solves, bounded below by rounding.
        key: of the random vectors that the Krylov spaces start from; default ``jax.random.key(0)``.
        **solve: options of ``joint_solve``; only with a first input.

    Returns:
        The ``Diagnosis``.

    Raises:
        TypeError: as ``joint_solve``, or if a solution comes with a start or with options.
        ValueError: as ``joint_solve``, or if an option is out of range.
    """
    _options.check_count("diagnose", "dimension", dimension)
    _options.check_positive("diagnose", "linear_rtol", linear_rtol)
    solution = _solution(problem, params, target, x0, z0, data, solve)
    z, x, mu = solution.value
    arguments = check_arguments(
        "diagnose", problem, params, target, x, z, data, mu, Controls(0.0, 0.0), LoopOptions(1)
    )
    key = jax.random.key(0) if key is None else key
    options = (step_size, float(linear_rtol), key)
    return _diagnose(arguments, solution, options, problem=problem, dimension=dimension)


def _solution(
    problem: InputProblem,
    params: PyTree,
    target: PyTree,
    x0: PyTree | Solution,
    z0: PyTree | None,
    data: PyTree,
    solve: dict[str, Any],
) -> Solution:
    if not isinstance(x0, Solution):
        if z0 is None:
            raise TypeError(
                "diagnose: x0 was given without z0, but a Solution, or both a first input and a "
                "first state are expected; pass z0."
            )
        return joint_solve(problem, params, target, x0, z0, data=data, **solve)
    if z0 is not None or solve:
        given = "z0" if z0 is not None else ", ".join(solve)
        raise TypeError(
            f"diagnose: a Solution was given together with {given}, but what is there is not "
            f"solved again; pass either the Solution or x0 and z0 with the options of joint_solve."
        )
    if not isinstance(x0.value, AugmentedState):
        raise TypeError(
            f"diagnose: a Solution whose value is a {type(x0.value).__name__} was given, but that "
            f"of joint_solve or nested_solve is expected, an AugmentedState(z, x, mu)."
        )
    return x0


def _places(first: Any, second: Any) -> Diagnosis:
    """See ``jdeq._shards.automatic``."""
    numbers = [first] * (len(dataclasses.fields(Diagnosis)) - 1)
    return Diagnosis(places(first, second), *numbers)


@functools.partial(jax.jit, static_argnames=("problem", "dimension"))
@automatic(_places)
def _diagnose(
    arguments: tuple[PyTree, PyTree, tuple, AugmentedState],
    solution: Solution,
    options: tuple[float | Array | None, float, Array],
    *,
    problem: InputProblem,
    dimension: int,
) -> Diagnosis:
    arguments, solution, options = vary_alike((arguments, solution, options))
    params, target, rest, at = lax.stop_gradient(arguments)
    step_size, linear_rtol, key = options
    pure, theta = purify("diagnose", problem, params, target, at.x, at.z, rest)
    given = Given(theta, target, rest)
    evaluation = augmented.evaluate(pure, theta, target, rest, at)
    keys = jax.random.split(key, 5)

    _, push = jax.linearize(lambda z: pure.cell(theta, (at.x, *rest), z), at.z)
    state_radius = _spectrum.spectral_radius(
        push, _tree.normal_like(keys[0], at.z), dimension=dimension
    )
    radii = _spectrum.relaxed_radii(
        push, _tree.normal_like(keys[4], at.z), _RELAXATIONS, dimension=dimension
    )
    reduced = Reduced.at(pure, given, at, linear_rtol)
    kernel = reduced.kernel_range(keys[1], dimension)
    hessian = reduced.hessian_range(keys[2], dimension)
    # A slope that is not finite leaves nothing to solve for: zeros would pass for measurements.
    known = jnp.isfinite(reduced.adjoint_residual)
    hessian = Range(*(jnp.where(known, value, jnp.nan) for value in hessian))

    size, scale = 1 + _tree.norm(at.x), jnp.abs(evaluation.objective)
    scale = jnp.where(scale > 0, scale, 1)
    if step_size is None:
        flat = hessian.largest <= 0
        step = jnp.where(flat, size**2 / scale, 1 / jnp.where(flat, 1, hessian.largest))
    else:
        step = jnp.broadcast_to(jnp.asarray(step_size, size.dtype), size.shape)
    return Diagnosis(
        solution=solution,
        relative=KKTResidual(
            relative(_tree.subtract(evaluation.state, at.z), evaluation.state),
            relative(_tree.subtract(evaluation.adjoint, at.mu), evaluation.adjoint),
            solution.residual.stationarity,
        ),
        state_radius=state_radius,
        state_relaxation=_best_relaxation(radii),
        augmented_radius=_augmented_radius(
            pure, given, at, (step, _bend(reduced, keys[0])), keys[3], dimension
        ),
        step_size=step,
        kernel_condition=ratio(kernel.largest, kernel.smallest),
        pl_constant=jnp.maximum(kernel.smallest, 0),
        hessian_smallest=hessian.smallest,
        hessian_largest=hessian.largest,
        linear_residual=reduced.adjoint_residual,
    )


def _best_relaxation(radii: Array) -> Array:
    """The relaxation of the smallest of ``radii``, ``[len(_RELAXATIONS), B]``."""
    best = jnp.asarray(_RELAXATIONS, radii.dtype)[jnp.argmin(radii, axis=0)]
    return jnp.where(jnp.any(jnp.isnan(radii), axis=0), jnp.nan, best)


def _augmented_radius(
    pure: PureProblem,
    given: Given,
    at: AugmentedState,
    units: tuple[Array, Array],
    key: Array,
    dimension: int,
) -> Array:
    """Of ``(f, P(x - step g), A)``, whose eigenvalues do not depend on the units of mu and x.

    In these units each block moves the next one alike: in others, rounding in float32 drowns them.
    """
    step, bend = units
    at = at._replace(mu=_tree.scale(1 / bend, at.mu))
    run = JointRun(pure, Polished(), LoopOptions(1))
    length = jnp.sqrt(step * bend)
    inputs = (given.target, given.rest, Units(bend, length, jnp.ones_like(bend)))
    _, push = jax.linearize(lambda at: run.augmented_map(given.theta, inputs, at), at)
    unit = jnp.where(length > 0, length, 1)

    def balanced(v: AugmentedState) -> AugmentedState:
        image = push(v._replace(x=_tree.scale(unit, v.x)))
        return image._replace(x=_tree.scale(1 / unit, image.x))

    start = _tree.normal_like(key, at)
    return _spectrum.spectral_radius(balanced, start, dimension=dimension)


def _bend(reduced: Reduced, key: Array) -> Array:
    """How much the adjoint equation's right-hand side changes with the state, or 1, ``[B]``."""
    v = _tree.normal_like(key, reduced.z)
    by_z, _ = reduced.curvature(v, _tree.zeros_like(reduced.x))
    bend = _tree.norm(by_z) / _tree.norm(v)
    return jnp.where(jnp.isfinite(bend) & (bend > 0), bend, 1)
