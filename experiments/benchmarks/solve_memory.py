"""Whether the memory of a solve and its gradient grows with the number of steps.

    python -m experiments.benchmarks.solve_memory --output memory.json

XLA's own account of the compiled gradient (temporary, argument and output bytes) at a limit of 20
and of 200 steps, for the gradients that claim constant memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

import jdeq
from experiments.benchmarks.problems import PROBLEMS, Problem, inner_product
from experiments.benchmarks.timing import surroundings

STEPS = (20, 200)
BAR = 1.05
CONSTANT = ("Implicit", "ImplicitForward", "Shine", "Reversible")
"""Adjoints whose memory must not grow."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: JSON file to write.
        problems: which problems.
        batch: problems a batch; None is 256, and 48 for mnist.
    """

    output: Path
    problems: tuple[str, ...] = ("dense", "mnist")
    batch: int | None = None


def main(options: Options) -> None:
    """Print and write the bytes of each problem and adjoint."""
    rows: dict[str, Any] = {}
    for name in options.problems:
        problem = PROBLEMS[name]() if options.batch is None else PROBLEMS[name](options.batch)
        rows[name] = {adjoint: row(problem, adjoint) for adjoint in CONSTANT}
    result = {"steps": STEPS, "bar": BAR, **surroundings(), "bytes": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


def row(problem: Problem, adjoint: str) -> dict[str, Any]:
    """Bytes at both limits and their ratio, or why there are none."""
    kind = getattr(jdeq.adjoints, adjoint, None)
    if kind is None:
        print(f"{problem.name:6s} {adjoint:16s} is not in this version")
        return {"absent": True}
    solvers = jdeq.solvers
    solver = solvers.Reversible() if adjoint == "Reversible" else solvers.Anderson()
    counts = [peak(problem, kind(), solver, steps) for steps in STEPS]
    growth = counts[1] / counts[0]
    print(
        f"{problem.name:6s} {adjoint:16s} {counts[0]:14,} bytes at {STEPS[0]} steps, "
        f"{counts[1]:14,} at {STEPS[1]}: {growth:.3f} times, to be at most {BAR}",
        flush=True,
    )
    return {"bytes": counts, "growth": growth}


def peak(problem: Problem, adjoint: Any, solver: Any, max_steps: int) -> int:
    """Bytes that the compiled gradient in parameters and inputs needs in all."""

    def loss(params: Any, x: Any, z0: Any, weights: Any) -> Any:
        solution = jdeq.deq(
            problem.cell, params, problem.inject(params, x), z0,
            solver=solver, adjoint=adjoint, max_steps=max_steps,
        )  # fmt: skip
        return inner_product(weights, solution.value)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    given = (problem.params, problem.x, problem.z0, problem.weights)
    analysis = gradient.lower(*given).compile().memory_analysis()
    assert analysis is not None, "this backend gives no account of its memory"
    parts = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes")
    return sum(getattr(analysis, part) for part in parts)


if __name__ == "__main__":
    main(tyro.cli(Options))
