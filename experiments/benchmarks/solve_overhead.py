"""What a step of a solve costs beyond the evaluation of its cell.

    python -m experiments.benchmarks.solve_overhead --output overhead.json

The same number of evaluations of the same cell is timed in a bare loop that does nothing else, in
turns with the solves. A step's cost is the difference of a long and a short run over the difference
of their steps, so that entering a program does not count. The tolerance is zero, so that no problem
finishes; that all steps were taken is checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array, lax

import jdeq
from experiments.benchmarks.problems import PROBLEMS, Problem
from experiments.benchmarks.timing import Seconds, seconds, spread, surroundings

PyTree = Any

SOLVERS = {
    "Picard": jdeq.solvers.Picard(),
    "Anderson(5)": jdeq.solvers.Anderson(window=5),
    "Anderson(10)": jdeq.solvers.Anderson(window=10),
}
BARS = {
    ("mnist", "Picard"): 1.10,
    ("mnist", "Anderson(10)"): 1.20,
    ("dense", "Picard"): 1.5,
    ("dense", "Anderson(10)"): 1.5,
}


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        output: JSON file to write.
        problems: `dense`, `mnist` or both.
        short: steps of the short run; more than the longest window.
        long: steps of the long run; below the 40 after which a solve may count as stagnated.
        repeats: rounds; each times every contestant once.
        batch: problems a batch; None is 256, and 48 for mnist.
    """

    output: Path
    problems: tuple[str, ...] = ("dense", "mnist")
    short: int = 12
    long: int = 36
    repeats: int = 9
    batch: int | None = None


def main(options: Options) -> None:
    """Time all problems, print and write the result."""
    rows = {name: measure(build(name, options.batch), options) for name in options.problems}
    result = {
        "steps": [options.short, options.long],
        "repeats": options.repeats,
        **surroundings(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


def build(name: str, batch: int | None) -> Problem:
    """The problem; the dense one with weights under which no residual becomes exactly zero."""
    options: dict[str, Any] = {} if batch is None else {"batch": batch}
    if name == "dense":
        options["norm"] = 3.0
    return PROBLEMS[name](**options)


def measure(problem: Problem, options: Options) -> dict[str, Any]:
    """Time of a step of each contestant over that of the bare loop, paired by round."""
    contestants = {"bare": bare_loop(problem)}
    for name, solver in SOLVERS.items():
        contestants[name] = solve(problem, solver, options)
    samples: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for round_number in range(options.repeats + 1):
        for name, run in contestants.items():
            long, short = timed(run, options.long), timed(run, options.short)
            if round_number:  # The first one compiles.
                steps = options.long - options.short
                samples[name].append(
                    Seconds((long.wall - short.wall) / steps, (long.cpu - short.cpu) / steps)
                )
    columns = {name: Seconds(*np.array(values).T) for name, values in samples.items()}
    return {name: row(problem.name, name, columns) for name in columns}


def row(problem: str, name: str, columns: dict[str, Seconds]) -> dict[str, Any]:
    """Print and return one contestant's ratios to the bare loop."""
    own, bare = columns[name], columns["bare"]
    ratio, cpu_ratio = spread(own.wall / bare.wall, 4), spread(own.cpu / bare.cpu, 4)
    bar = BARS.get((problem, name))
    print(
        f"{problem:6s} {name:14s} {1e3 * np.median(own.wall):8.3f} ms a step, "
        f"{ratio['median']:.3f} times the bare loop ({ratio['min']:.3f} to {ratio['max']:.3f}), "
        f"{cpu_ratio['median']:.3f} in cpu time"
        + ("" if bar is None else f", to be at most {bar}"),
        flush=True,
    )
    return {
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "seconds_per_step": spread(own.wall),
        "cpu_seconds_per_step": spread(own.cpu),
        "bar": bar,
    }


def timed(run: Callable[[Array], PyTree], steps: int) -> Seconds:
    """Seconds of one run of so many steps."""
    budget = jax.block_until_ready(jnp.asarray(steps))
    return seconds(lambda: run(budget))


def bare_loop(problem: Problem) -> Callable[[Array], PyTree]:
    """The cell in a loop and nothing else."""

    @jax.jit
    def run(params: PyTree, injected: PyTree, steps: Array) -> PyTree:
        return lax.fori_loop(0, steps, lambda _, z: problem.cell(params, z, injected), problem.z0)

    injected = problem.inject(problem.params, problem.x)
    return lambda steps: run(problem.params, injected, steps)


def solve(problem: Problem, solver: Any, options: Options) -> Callable[[Array], PyTree]:
    """A solve that takes exactly the steps it is given."""

    def run(steps: Array) -> jdeq.Solution:
        return jdeq.deq(
            problem.cell, problem.params, injected, problem.z0, solver=solver,
            rtol=0.0, atol=0.0, max_steps=options.long, step_budget=steps,
        )  # fmt: skip

    injected = problem.inject(problem.params, problem.x)
    for steps in (options.short, options.long):
        taken = np.asarray(run(jnp.asarray(steps)).steps)
        if not np.all(taken == steps):
            raise RuntimeError(
                f"{problem.name}: {steps} steps were asked for, but between {taken.min()} and "
                f"{taken.max()} were taken, so that the difference of two runs says nothing."
            )
    return run


if __name__ == "__main__":
    main(tyro.cli(Options))
