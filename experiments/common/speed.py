"""How much faster the joint solve reaches an objective than gradient descent through the network.

Every method runs on the same problems, and all inputs x_k it passes through are kept. Outside the
timer, the equilibrium of each x_k is solved anew, to a relative residual of 1e-6, and the
objective is taken there: off equilibrium, l(z_k, x_k) is not the objective. The target of a
problem is `f_best + 0.01 (f_0 - f_best)`, with `f_best` the best that any of the methods found.
A problem's time is that of the batch up to the first iterate at the target, and infinite if there
is none. Joint and nested are tuned, each over its candidates, on problems that are not the test
problems; the published nested method is taken as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jdeq
from experiments.common.scaling import scale_problem, scale_start
from experiments.common.terminal import say, warn

PyTree = Any

_TARGET = 0.01  # share of the way from f_best back to f_0
_RESOLVE_RTOL = 1e-6
_RESOLVE_FAILED = 1e-5  # an equilibrium solved no better has no objective: it counts as infinite
_RESOLVE_STEPS = 300
_RELIABLE = 1.0  # share of the validation problems that the tuned joint solve must bring home
_ROWS = 64  # iterates of a method whose objective is taken, evenly spread
_BUDGETS = (0, 0.25, 0.5, 1)  # shares of a method's steps at which it is timed
_REPEATS = 3
_PUBLISHED_STEPS = 18  # of each forward and each backward solve


class Problems(NamedTuple):
    """A batch of input problems; leaves of all but `params` have the problem axis first.

    Attributes:
        params: What the problems share.
        target: Targets.
        x0: Starts of the inputs.
        z0: Starts of the states.
        data: Further constants, or None.
    """

    params: PyTree
    target: PyTree
    x0: PyTree
    z0: PyTree
    data: PyTree = None

    def scaled(self, rate: float) -> Problems:
        """The same problems in `u`, `x = rate u`, for the scaled problem."""
        u0, data = scale_start(self.x0, self.data, rate)
        return self._replace(x0=u0, data=data)

    def repeated(self, other: Problems) -> Problems:
        """These problems, over and over, until they are as many as the others, if fewer.

        Methods then are tuned at the batch size that they are timed at, by the same programs.
        """
        count, wanted = (jax.tree.leaves(problems.x0)[0].shape[0] for problems in (self, other))
        if count >= wanted:
            return self
        rows = np.arange(wanted) % count
        rest = (self.target, self.x0, self.z0, self.data)
        return Problems(self.params, *jax.tree.map(lambda leaf: leaf[rows], rest))


@dataclass(frozen=True)
class Candidate:
    """A method with its learning rates to choose from.

    Attributes:
        name: What reports call it.
        solve: `solve(problem, problems, step_budget)` makes at most `steps` steps, stops at no
            tolerance, and records `recorded_input`.
        steps: Iterations, or optimiser steps, of a full run.
        rates: Factors `s` of `x = s u`, `u` being what the method moves. On such a scaled input
            an optimiser whose steps do not depend on the gradient's scale (Adam's family) makes
            the very steps that it makes at the learning rate `s`; one compiled program so serves
            the whole grid.
        delay: Steps beyond k of a solve that returns its k-th input: one that measures it, and for
            the joint solve a last one that measures it exactly.
    """

    name: str
    solve: Callable[[jdeq.InputProblem, Problems, Array], jdeq.Solution]
    steps: int
    rates: tuple[float, ...] = (1.0,)
    delay: int = 1


def joint_candidate(
    name: str, method: Any, steps: int, rates: tuple[float, ...] = (1.0,)
) -> Candidate:
    """The joint solve with a method of `jdeq.joint`; its first step is the rate.

    Iterations have to cost what they do whatever the step budget, and so schedules that span it
    are welcome, phases that do are not (`Polished`).
    """

    def solve(problem: jdeq.InputProblem, at: Problems, budget: Array) -> jdeq.Solution:
        return jdeq.joint_solve(
            problem, at.params, at.target, at.x0, at.z0, data=at.data, method=method,
            rtol=0.0, atol=0.0, max_steps=steps, step_budget=budget, history=recorded_input,
        )  # fmt: skip

    return Candidate(name, solve, steps, rates, delay=2)


def nested_candidate(
    name: str,
    optimizer: optax.GradientTransformation,
    steps: int,
    rates: tuple[float, ...] = (1.0,),
    inner: jdeq.joint.InnerSolve | None = None,
) -> Candidate:
    """The nested solve; by default warm-started and stopped at a relative residual of 1e-3."""
    inner = jdeq.joint.InnerSolve(rtol=1e-3, warm_start=True) if inner is None else inner

    def solve(problem: jdeq.InputProblem, at: Problems, budget: Array) -> jdeq.Solution:
        return jdeq.nested_solve(
            problem, at.params, at.target, at.x0, at.z0, data=at.data, optimizer=optimizer,
            forward=inner, rtol=0.0, atol=0.0, max_steps=steps, step_budget=budget,
            history=recorded_input,
        )  # fmt: skip

    return Candidate(name, solve, steps, rates)


def published_candidate(optimizer: optax.GradientTransformation, steps: int) -> Candidate:
    """The published baseline: cold solves of always 18 forward and 18 backward steps."""
    inner = jdeq.joint.InnerSolve(max_steps=_PUBLISHED_STEPS, rtol=0.0, warm_start=False)
    return nested_candidate("Adam, cold solves", optimizer, steps, inner=inner)


def recorded_input(state: jdeq.AugmentedState) -> PyTree:
    """What candidates record of every iterate."""
    return state.x


@dataclass(frozen=True, eq=False)
class Measured:
    """A method on the test problems.

    Attributes:
        name: Its name, with the chosen rate.
        seconds: Time of the batch up to each iterate that was looked at, [K].
        objectives: Objective there, at the re-solved equilibrium, [K, B].
        reached: Time at which each problem reached its target, infinite if it never did, [B].
    """

    name: str
    seconds: np.ndarray
    objectives: np.ndarray
    reached: np.ndarray

    @property
    def share_reached(self) -> float:
        """Share of the problems that reached their target."""
        return float(np.isfinite(self.reached).mean())


@dataclass(frozen=True, eq=False)
class Comparison:
    """The outcome of `compare`.

    Attributes:
        joint: The tuned joint solve.
        nested: The tuned nested solve.
        published: The published nested solve.
    """

    joint: Measured
    nested: Measured
    published: Measured

    def speedup(self, other: Measured) -> np.ndarray:
        """Time of another method over the joint solve's, [B]; 0 where joint never arrived."""
        arrived = np.isfinite(self.joint.reached)
        return np.where(arrived, other.reached, 0.0) / np.where(arrived, self.joint.reached, 1.0)

    def gaps(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each of the three: seconds [K] and `(f_k - f_best) / (f_0 - f_best)`, [K, B]."""
        methods = (self.joint, self.nested, self.published)
        best = np.min([method.objectives.min(axis=0) for method in methods], axis=0)
        first = self.joint.objectives[0]
        # Where no method improved on the start there is no gap to close.
        whole = np.where(first > best, first, np.inf) - np.where(np.isfinite(best), best, np.nan)
        kinds = ("joint", "nested", "published")
        return {
            kind: (method.seconds, np.maximum(method.objectives - best, 0) / whole)
            for kind, method in zip(kinds, methods, strict=True)
        }

    def summary(self) -> dict[str, float | int | str]:
        """The flat results: medians, quartiles and shares over the test problems."""
        result: dict[str, float | int | str] = {"speed_problems": len(self.joint.reached)}
        for name, other in (("nested", self.nested), ("published", self.published)):
            ratios = self.speedup(other)
            # Medians and quartiles that are ratios themselves: infinities do not interpolate.
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75), method="lower")
            result[f"speedup_{name}"] = float(middle)
            result[f"speedup_{name}_quartile_low"] = float(low)
            result[f"speedup_{name}_quartile_high"] = float(high)
            result[f"share_{name}_reached"] = other.share_reached
            result[f"method_{name}"] = other.name
        # A method that never arrives needs at least the time that it was given.
        at_least = np.minimum(self.published.reached, self.published.seconds[-1])
        ratios = np.where(np.isfinite(self.joint.reached), at_least, 0.0) / self.joint.reached
        result["speedup_published_at_least"] = float(np.quantile(ratios, 0.5, method="lower"))
        result["share_joint_reached"] = self.joint.share_reached
        result["method_joint"] = self.joint.name
        return result


def compare(
    problem: jdeq.InputProblem,
    validation: Problems,
    test: Problems,
    joint: Sequence[Candidate],
    nested: Sequence[Candidate],
    published: Candidate,
) -> Comparison:
    """Tune joint and nested on the validation problems, then time all three on the test problems.

    Args:
        problem: The input problem.
        validation: Problems that the candidates are chosen by.
        test: Other problems, at least 256 for results that are reported.
        joint: Candidates of the joint solve.
        nested: Candidates of the tuned nested solve.
        published: The published nested method.
    """
    scaled = scale_problem(problem)
    validation = validation.repeated(test)
    runs = [(c, rate) for candidates in (joint, nested) for c in candidates for rate in c.rates]
    tried = _measure(problem, scaled, validation, runs, repeats=1)
    count = sum(len(candidate.rates) for candidate in joint)
    # The published number is a median: nested gets the candidate that is best by it, whatever
    # share of the problems it misses beyond; joint has to be reliable, too.
    chosen = [_tune(tried[:count], _RELIABLE), count + _tune(tried[count:], 0.5)]
    for index in chosen:
        say(f"tuned: {tried[index].name} (target met by {tried[index].share_reached:.0%})")
    finalists = [runs[index] for index in chosen] + [(published, published.rates[0])]
    return Comparison(*_measure(problem, scaled, test, finalists, repeats=_REPEATS))


def _tune(tried: Sequence[Measured], share: float) -> int:
    """The lowest median time among those that reach this share; else the largest share."""
    return min(
        range(len(tried)),
        key=lambda i: (-min(tried[i].share_reached, share), float(np.median(tried[i].reached))),
    )


def _measure(
    problem: jdeq.InputProblem,
    scaled: jdeq.InputProblem,
    problems: Problems,
    runs: Sequence[tuple[Candidate, float]],
    repeats: int,
) -> list[Measured]:
    trajectories, rows = [], []
    for candidate, rate in runs:
        at = problems.scaled(rate)
        solution = candidate.solve(scaled, at, jnp.asarray(candidate.steps))  # compiles, too
        # Always as many rows, repeated where there are fewer, so that nothing compiles anew. Those
        # after the last that a full run returns were never paid for.
        kept = np.linspace(0, candidate.steps - candidate.delay, _ROWS).round().astype(int)
        assert solution.history is not None
        inputs = jax.tree.map(partial(_rows, kept, rate), solution.history.record)
        trajectories.append(np.asarray(objectives(problem, problems, inputs), np.float64))
        rows.append(kept)
    seconds = _time(scaled, problems, runs, rows, repeats)

    target = _targets(trajectories)
    measured = []
    for (candidate, rate), trajectory, spent in zip(runs, trajectories, seconds, strict=True):
        arrived = trajectory <= target
        reached = np.where(arrived.any(axis=0), spent[arrived.argmax(axis=0)], np.inf)
        label = candidate.name if len(candidate.rates) == 1 else f"{candidate.name}, rate {rate:g}"
        measured.append(Measured(label, spent, trajectory, reached))
    return measured


def _targets(trajectories: Sequence[np.ndarray]) -> np.ndarray:
    """What each problem has to reach, [B]; NaN, which nobody reaches, where f_0 is infinite."""
    first = trajectories[0][0]
    known = np.isfinite(first)
    if not known.all():
        warn(
            f"{np.mean(~known):.0%} of the problems have no equilibrium at the start, to a "
            f"relative {_RESOLVE_FAILED:g}: nobody can reach their target."
        )
    best = np.min([trajectory.min(axis=0) for trajectory in trajectories], axis=0)
    return best + _TARGET * (np.where(known, first, np.nan) - best)


def _rows(kept: np.ndarray, rate: float, u: Array) -> Array:
    return rate * u[kept]


def _time(
    scaled: jdeq.InputProblem,
    problems: Problems,
    runs: Sequence[tuple[Candidate, float]],
    rows: Sequence[np.ndarray],
    repeats: int,
) -> list[np.ndarray]:
    """For each run, the seconds until it has returned each of its rows: medians of repeats.

    A budget of k steps returns the best of x_0 to x_{k - delay}; between the measured budgets the
    time is interpolated. The methods take turns, so that a busy spell of the machine hits all.
    """
    budgets = [
        sorted({max(1, round(share * candidate.steps)) for share in _BUDGETS})
        for candidate, _ in runs
    ]
    spent: list[Mapping[int, list[float]]] = [{k: [] for k in ks} for ks in budgets]
    for _ in range(repeats):
        for (candidate, rate), samples in zip(runs, spent, strict=True):
            at = problems.scaled(rate)
            for budget, times in samples.items():
                limit = jnp.asarray(budget)
                jax.block_until_ready((at, limit))
                started = time.perf_counter()
                jax.block_until_ready(candidate.solve(scaled, at, limit))
                times.append(time.perf_counter() - started)
    return [
        np.interp(
            kept + candidate.delay, list(samples), [np.median(times) for times in samples.values()]
        )
        for (candidate, _), kept, samples in zip(runs, rows, spent, strict=True)
    ]


@partial(jax.jit, static_argnames="problem")
def objectives(problem: jdeq.InputProblem, problems: Problems, inputs: PyTree) -> Array:
    """The objective of each input at its own equilibrium, solved to a relative 1e-6.

    Args:
        problem: The input problem.
        problems: The batch.
        inputs: Like x0, with an axis of iterates before the problem axis: [K, B, ...].

    Returns:
        [K, B]; infinite where the equilibrium could not be found.
    """
    rest = () if problems.data is None else (problems.data,)

    def evaluate(z: PyTree, x: PyTree) -> tuple[PyTree, Array]:
        solution = jdeq.deq(
            problem.cell, problems.params, x, z, data=problems.data,
            rtol=_RESOLVE_RTOL, atol=0.0, max_steps=_RESOLVE_STEPS,
        )  # fmt: skip
        z = solution.value
        objective = problem.objective(problems.params, z, x, problems.target, *rest)
        solved = solution.residual <= _RESOLVE_FAILED * _norm(z)
        solved &= solution.result < jdeq.Result.diverged
        return z, jnp.where(solved, objective, jnp.inf)

    return jax.lax.scan(evaluate, problems.z0, inputs)[1]


def _norm(tree: PyTree) -> Array:
    squares = [jnp.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], start=squares[0]))
