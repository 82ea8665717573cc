"""The published method with its published settings, to compare others with."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jdeq import _options
from jdeq.joint.accelerated import Accelerated
from jdeq.solvers.anderson import Anderson

_EARLIEST_SWITCH = 50


class _Settings(NamedTuple):
    """Settings of one published task.

    Attributes:
        first: step on x before the switch.
        last: step on x after it.
        points: iterates that are mixed, one more than there are differences.
        kind: of Anderson's method.
        steps: evaluations, all of which are spent.
        normalize: whether gradients are scaled to length one.
    """

    first: float
    last: float
    points: int
    kind: Literal["I", "II"]
    steps: int
    normalize: bool


_TASKS = {
    "mnist": _Settings(0.6, 0.2, 20, "I", 80, True),
    "cifar10": _Settings(0.1, 0.1, 20, "I", 80, True),
    "celeba": _Settings(0.01, 0.003, 40, "I", 100, False),
    "omniglot": _Settings(0.04, 0.01, 10, "II", 100, False),
}


@dataclasses.dataclass(frozen=True)
class StepSwitch:
    """A schedule with one switch, hashable by value.

    Attributes:
        first: value before step ``at``.
        last: value from step ``at`` on.
        at: number of a step, from 0.
    """

    first: float
    last: float
    at: int

    def __call__(self, k: Array) -> Array:
        """The value at step ``k``."""
        return jnp.where(k < self.at, self.first, self.last)


def published(
    task: Literal["mnist", "cifar10", "celeba", "omniglot"], max_steps: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of a solve by the method of Gurumurthy et al. (2021), as published.

        solution = jdeq.joint_solve(
            problem, params, target, x0, z0, **jdeq.joint.published("mnist")
        )

    Of each iteration's image ``z + 0.8 (f - z)``, ``mu + 0.6 (A - mu)`` and ``P(x - a g)``, with
    ``g / ||g||`` for ``g`` under ``"mnist"`` and ``"cifar10"``, Anderson's method mixes the last
    20 (40 for ``"celeba"``, 10 for ``"omniglot"``) over the concatenated ``(z, x, mu)`` of each
    problem, from the third evaluation on: type II for ``"omniglot"``, else type I, ``beta`` 1, not
    regularised. The step a falls from 0.6 to 0.2 (0.01 to 0.003; 0.04 to 0.01; 0.1 stays) once, in
    evaluation ``max(50, 5 max_steps / 8)``. All evaluations are spent: the tolerances are zero, and
    ``solution.result`` says ``max_steps``.

    The published runs start ``z``, ``mu`` and a perturbation x at zero, and the steps suit the
    published scales of the objective: for the attacks 10 times minus the cross-entropy, for the
    generator the sum of squared errors, for few-shot tasks 5 times the sum over the support of the
    cross-entropy plus the mean of x^2. The norms that are taken here of the gradient make the
    attacks' scale immaterial to x, though not to the mixing.

    On purpose, three things are not as published. A mixture is projected again, where the published
    code evaluates, and may return, inputs outside the set. The returned iterate is that of
    ``joint_solve``; the published rule accepts the newest if it is among the first ten, if the
    relative residual ``||F - s|| / ||F||`` of the relaxed map over the whole vector is the lowest
    so far, or if that is within 1.3 of the lowest and the objective below the last accepted one's.
    And a mixing whose system is singular is left out instead of regularised.

    Args:
        task: the published task.
        max_steps: evaluations, at least 1; None is the task's, 80 (attacks) or 100.

    Returns:
        ``method``, ``max_steps``, ``rtol`` and ``atol`` for ``joint_solve`` or ``input_value``.

    Raises:
        ValueError: if ``task`` is unknown or ``max_steps`` out of range.
    """
    _options.check_choice("published", "task", task, tuple(_TASKS))
    settings = _TASKS[task]
    steps = settings.steps if max_steps is None else max_steps
    _options.check_count("published", "max_steps", steps)
    switch = max(_EARLIEST_SWITCH, 5 * steps // 8)
    method = Accelerated(
        Anderson(window=settings.points - 1, kind=settings.kind, regularization=0.0),
        # Evaluations count from one there, steps from zero here.
        StepSwitch(settings.first, settings.last, switch - 1),
        state_relaxation=0.8,
        adjoint_relaxation=0.6,
        normalize=settings.normalize,
    )
    return {"method": method, "max_steps": steps, "rtol": 0.0, "atol": 0.0}
