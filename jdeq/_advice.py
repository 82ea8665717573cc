"""The words of a diagnosis: a table of its numbers, and what to do about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from jdeq.solution import Result

if TYPE_CHECKING:
    from jdeq.diagnostics import Diagnosis

_SLOW = 0.95
"""A radius above this needs more than 130 steps for three digits."""

_LAGGING = 0.6
"""Below this radius state and adjoint follow x within a few steps as it is."""

_OVER = 1.2
"""A relaxation above this is worth a sentence."""

_ILL_CONDITIONED = 1e3
"""Gradient descent needs about as many steps as the condition number for a digit."""

_DEGENERATE = 1e8
"""A tangent kernel of such a condition is singular for all that float32 can tell."""

_UNRELIABLE = 1e-2
"""Relative residual of a linear solve above which what hangs on it is no measurement."""

_NEGATIVE = 1e-4
"""Share of the largest curvature that a negative one must have to count as such."""

_FLOOR = 100
"""Relative residuals within so many machine epsilons are as small as rounding lets them be."""

_BLOCKS = {"state": "state", "adjoint": "adjoint", "stationarity": "input (stationarity)"}


class _Row(NamedTuple):
    label: str
    values: np.ndarray
    low_is_bad: bool = False


def report(diagnosis: Diagnosis) -> str:
    """A table of medians and worst cases, the outcomes, and the advice."""
    rows = [
        _Row("state residual, relative", _array(diagnosis.relative.state)),
        _Row("adjoint residual, relative", _array(diagnosis.relative.adjoint)),
        _Row("stationarity", _array(diagnosis.relative.stationarity)),
        _Row("spectral radius of the cell", _array(diagnosis.state_radius)),
        _Row("best relaxation of the state", _array(diagnosis.state_relaxation), low_is_bad=True),
        _Row("spectral radius of the joint map", _array(diagnosis.augmented_radius)),
        _Row("  at a step on x of", _array(diagnosis.step_size)),
        _Row("largest stable step", _array(diagnosis.largest_stable_step), low_is_bad=True),
        _Row("smallest curvature along x", _array(diagnosis.hessian_smallest), low_is_bad=True),
        _Row("largest curvature along x", _array(diagnosis.hessian_largest)),
        _Row("condition of the Hessian", _array(diagnosis.hessian_condition)),
        _Row("condition of the tangent kernel", _array(diagnosis.kernel_condition)),
        _Row("PL* constant", _array(diagnosis.pl_constant), low_is_bad=True),
    ]
    count = len(rows[0].values)
    header = f"Diagnosis of {count} problem{'s' * (count > 1)}: {_outcomes(diagnosis)}"
    lines = [header, "", f"{'':34}{'median':>10}{'worst':>11}  problem"]
    lines += [_line(row) for row in rows]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in advice(diagnosis))])


def advice(diagnosis: Diagnosis) -> list[str]:
    """What stands out, the outcome first."""
    found = [
        *_of_outcomes(diagnosis),
        *_of_rounding(diagnosis),
        *_of_solves(diagnosis),
        *_of_contraction(diagnosis),
        *_of_relaxation(diagnosis),
        *_of_steps(diagnosis),
        *_of_curvature(diagnosis),
        *_of_kernel(diagnosis),
    ]
    return found or ["Nothing stands out: all problems converged and are well conditioned."]


def _of_outcomes(diagnosis: Diagnosis) -> list[str]:
    codes = _array(diagnosis.solution.result)
    found = [
        f"{_share(codes == code)} ended as {code.name}. {Result.message(code)}"
        for code in Result
        if code != Result.converged and np.any(codes == code)
    ]
    unfinished = (codes == Result.max_steps) | (codes == Result.stagnated)
    if np.any(unfinished):
        blocks = {name: _array(getattr(diagnosis.relative, name))[unfinished] for name in _BLOCKS}
        medians = {name: float(np.nanmedian(values)) for name, values in blocks.items()}
        worst = max(medians, key=lambda name: medians[name])
        found.append(
            f"Of the unfinished problems' residuals that of the {_BLOCKS[worst]} is the largest, "
            f"relative to its tolerance: {_number(medians[worst])} in the median."
        )
    return found


def _of_rounding(diagnosis: Diagnosis) -> list[str]:
    floor = _at_floor(diagnosis)
    if not np.any(floor):
        return []
    dtype = np.dtype(diagnosis.relative.state.dtype).name
    return [
        f"In {_share(floor)} that did not converge all residuals are at the rounding floor of "
        f"{dtype}: no further step makes them smaller; ask for a looser rtol, or compute at a "
        f"higher precision."
    ]


def _of_solves(diagnosis: Diagnosis) -> list[str]:
    bad = ~(_array(diagnosis.linear_residual) <= _UNRELIABLE)
    if not np.any(bad):
        return []
    return [
        f"The linear solves behind curvatures and kernel did not converge in {_share(bad)}: those "
        f"numbers mean nothing there; I - df/dz is close to singular, or the problem failed."
    ]


def _of_contraction(diagnosis: Diagnosis) -> list[str]:
    radius = _array(diagnosis.state_radius)
    if np.any(radius >= 1):
        return [
            f"The cell is no contraction at the solution of {_share(radius >= 1)} (spectral radius "
            f"up to {_number(np.nanmax(radius))}, problem {_worst(radius)}): damp the state "
            f"(state_relaxation below 1 helps against negative and complex eigenvalues only), take "
            f"a solver that needs no contraction (Anderson, NewtonKrylov), or train with "
            f"jdeq.nn.limit_spectral_norm or the Jacobian penalty."
        ]
    if np.any(radius >= _SLOW):
        steps = int(np.ceil(np.log(1e-3) / np.log(np.nanmax(radius))))
        return [
            f"The cell contracts slowly in {_share(radius >= _SLOW)} (spectral radius up to "
            f"{np.nanmax(radius):.3f}): plain iteration needs {steps} steps for three digits; "
            f"allow more max_steps, or train with a tighter bound on the cell."
        ]
    return []


def _of_relaxation(diagnosis: Diagnosis) -> list[str]:
    best, radius = _array(diagnosis.state_relaxation), _array(diagnosis.state_radius)
    lags = (radius >= _LAGGING) & (radius < 1)
    if not np.all(lags) or not np.all(best >= _OVER):
        return []
    return [
        f"State and adjoint lag behind x (what is left of an error after a step is "
        f"{_number(float(np.median(radius)))} of it), and the eigenvalues of the cell that were "
        f"found allow over-relaxation: take Descent with state_relaxation and "
        f"adjoint_relaxation of {np.min(best):.1f}."
    ]


def _of_steps(diagnosis: Diagnosis) -> list[str]:
    step, stable = _array(diagnosis.step_size), _array(diagnosis.largest_stable_step)
    radius = _array(diagnosis.augmented_radius)
    # A method that got there need not be the plain iteration. A curvature of zero leaves the radius
    # at one, to rounding, whatever the step.
    unstable = (radius > 1 + 1e-4) & (_array(diagnosis.solution.result) != Result.converged)
    unstable &= (_array(diagnosis.state_radius) < 1) & ~_negative(diagnosis)
    unstable &= ~_at_floor(diagnosis)
    too_long = step > stable
    found = []
    if np.any(too_long):
        found.append(
            f"The step on x is longer than gradient descent allows in {_share(too_long)}: the "
            f"smallest of the largest stable steps is {_number(np.nanmin(stable))} (problem "
            f"{_worst(-stable)}); take half of that, or a step that decays (Descent)."
        )
    elif np.any(unstable):
        found.append(
            f"The plain joint iteration diverges in {_share(unstable)}, none of them converged, "
            f"although its step on x suits exact gradients: the adjoint lags behind x; take a "
            f"shorter step, or Polished, which waits for it."
        )
    return found


def _of_curvature(diagnosis: Diagnosis) -> list[str]:
    negative = _negative(diagnosis)
    condition = _array(diagnosis.hessian_condition)
    # Where nothing is curved there is nothing to be ill-conditioned: a constraint holds x.
    ill = (condition > _ILL_CONDITIONED) & ~negative & (_array(diagnosis.hessian_largest) > 0)
    found = []
    if np.any(negative):
        found.append(
            f"The objective curves downwards along some direction of x in {_share(negative)}: that "
            f"is no minimum unless a constraint holds x there; use more steps, several starts, or "
            f"a penalty on x."
        )
    if np.any(ill):
        found.append(
            f"The objective is ill-conditioned along x in {_share(ill)} (condition up to "
            f"{_number(np.nanmax(condition[ill]))}): gradient descent needs about as many steps a "
            f"digit; take Polished or momentum, or a penalty on x, which raises the smallest "
            f"curvature."
        )
    return found


def _of_kernel(diagnosis: Diagnosis) -> list[str]:
    condition = _array(diagnosis.kernel_condition)
    degenerate = condition > _DEGENERATE
    if not np.any(degenerate):
        return []
    return [
        f"Some direction of x hardly moves the state in {_share(degenerate)} (PL* constant down to "
        f"{_number(np.nanmin(_array(diagnosis.pl_constant)))}): only a penalty or a constraint "
        f"decides x along it; add one, or take fewer inputs."
    ]


def _negative(diagnosis: Diagnosis) -> np.ndarray:
    smallest, largest = _array(diagnosis.hessian_smallest), _array(diagnosis.hessian_largest)
    return smallest < -_NEGATIVE * np.maximum(np.abs(largest), np.abs(smallest))


def _at_floor(diagnosis: Diagnosis) -> np.ndarray:
    """Which unfinished problems cannot be solved any better in their dtype."""
    codes = _array(diagnosis.solution.result)
    unfinished = (codes == Result.max_steps) | (codes == Result.stagnated)
    limit = _FLOOR * float(jnp.finfo(diagnosis.relative.state.dtype).eps)
    return unfinished & (np.max([_array(block) for block in diagnosis.relative], axis=0) <= limit)


def _outcomes(diagnosis: Diagnosis) -> str:
    codes = _array(diagnosis.solution.result)
    counts = {code.name: int(np.sum(codes == code)) for code in Result}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _line(row: _Row) -> str:
    known = row.values[~np.isnan(row.values)]
    if not len(known):
        return f"{row.label:34}{'unknown':>10}"
    worst = _worst(-row.values if row.low_is_bad else row.values)
    middle = _number(float(np.median(known)))
    return f"{row.label:34}{middle:>10}{_number(row.values[worst]):>11}{worst:>9}"


def _worst(values: np.ndarray) -> int:
    return int(np.nanargmax(values))


def _share(where: np.ndarray) -> str:
    return f"{int(np.sum(where))} of {len(where)} problems"


def _number(value: float) -> str:
    return f"{float(value):.3g}"


def _array(values: object) -> np.ndarray:
    """In float64, which is no less exact and prints alike everywhere."""
    return np.asarray(values, np.float64)
