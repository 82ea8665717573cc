"""The input problem: a cell, an objective and a constraint set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _closures, _options

PyTree = Any


@dataclasses.dataclass(frozen=True)
class InputProblem:
    """Minimise ``objective`` over the input ``x`` of an equilibrium, one problem a batch element.

        minimise over x in C:  objective(params, z, x, target)  subject to  z = cell(params, z, x)

    (Gurumurthy et al. 2021, equation 5.) All three functions act on whole batches, independently
    across problems, must be pure, and take ``data`` as a last argument when a solve is given it.

    Attributes:
        cell: ``cell(params, z, x[, data]) -> z``.
        objective: ``objective(params, z, x, target[, data]) -> [B]``, one loss a problem.
        project: ``project(x[, data]) -> x``, the Euclidean projection on C; None is no constraint.

    Raises:
        TypeError: if one of them cannot be called.
    """

    cell: Callable[..., PyTree]
    objective: Callable[..., Array]
    project: Callable[..., PyTree] | None = None

    def __post_init__(self) -> None:
        for name in ("cell", "objective", "project"):
            function = getattr(self, name)
            if name == "project" and function is None:
                continue
            _options.check_function("InputProblem", name, function)


class Theta(NamedTuple):
    """Everything that the problems of a batch share.

    Attributes:
        params: the caller's parameters.
        cell: arrays that the cell captured.
        objective: arrays that the objective captured.
        project: arrays that the projection captured.
    """

    params: PyTree
    cell: list
    objective: list
    project: list


@dataclasses.dataclass(frozen=True)
class PureProblem:
    """An ``InputProblem`` whose functions capture nothing: they take a ``Theta`` instead.

    ``inputs`` is ``(x,)`` or ``(x, data)`` and ``rest`` is ``()`` or ``(data,)``, so that the
    optional last argument is passed on or left out.
    """

    cell: Callable[[Theta, tuple, PyTree], PyTree]
    objective: Callable[[Theta, PyTree, PyTree, PyTree, tuple], Array]
    project: Callable[[Theta, PyTree, tuple], PyTree] | None


def purify(
    owner: str,
    problem: InputProblem,
    params: PyTree,
    target: PyTree,
    x0: PyTree,
    z0: PyTree,
    rest: tuple,
) -> tuple[PureProblem, Theta]:
    """Hoists what the problem's functions capture, and checks the shapes they return.

    Args:
        owner: the public function in whose name errors speak.
        problem: the problem.
        params: as given by the caller.
        target: as given by the caller.
        x0: as given by the caller.
        z0: as given by the caller.
        rest: ``()`` or ``(data,)``.

    Returns:
        The pure problem and its ``Theta``.

    Raises:
        ValueError: if the cell does not return a state, the objective not one number a problem, or
            the projection not an input.
    """
    cell, cell_captured = _closures.hoist(
        owner, "cell", lambda p, z, x, rest: problem.cell(p, z, x, *rest), params, z0, x0, rest
    )
    objective, objective_captured = _closures.hoist(
        owner,
        "objective",
        lambda p, z, x, target, rest: problem.objective(p, z, x, target, *rest),
        params,
        z0,
        x0,
        target,
        rest,
    )
    project, project_captured = _purify_projection(owner, problem.project, x0, rest)
    pure = PureProblem(
        cell=lambda theta, inputs, z: cell(theta.cell, theta.params, z, inputs[0], inputs[1:]),
        objective=lambda theta, z, x, target, rest: objective(
            theta.objective, theta.params, z, x, target, rest
        ),
        project=project,
    )
    theta = Theta(params, cell_captured, objective_captured, project_captured)
    _check_outputs(owner, pure, theta, target, x0, z0, rest)
    return pure, theta


def _purify_projection(
    owner: str, project: Callable | None, x0: PyTree, rest: tuple
) -> tuple[Callable[[Theta, PyTree, tuple], PyTree] | None, list]:
    if project is None:
        return None, []
    pure, captured = _closures.hoist(owner, "project", lambda x, rest: project(x, *rest), x0, rest)
    return lambda theta, x, rest: pure(theta.project, x, rest), captured


def _check_outputs(
    owner: str, pure: PureProblem, theta: Theta, target: PyTree, x0: PyTree, z0: PyTree, rest: tuple
) -> None:
    count = jax.tree.leaves(z0)[0].shape[0]
    _options.check_same(
        owner,
        "the output of cell",
        jax.eval_shape(pure.cell, theta, (x0, *rest), z0),
        z0,
        "a cell must return a state like the one it is given: same structure, shapes and dtypes.",
    )
    losses = jax.eval_shape(pure.objective, theta, z0, x0, target, rest)
    alone = isinstance(losses, jax.ShapeDtypeStruct)
    if not alone or losses.shape != (count,) or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"{owner}: objective returns {jax.tree.map(_options.describe, losses)}, but "
            f"floating-point losses of shape {(count,)} are expected, one a problem; sum over the "
            f"axes of a problem, not over the batch."
        )
    if pure.project is not None:
        _options.check_same(
            owner,
            "the output of project",
            jax.eval_shape(pure.project, theta, x0, rest),
            x0,
            "a projection must return an input like the one it is given.",
        )
