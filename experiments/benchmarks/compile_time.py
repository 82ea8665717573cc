"""How long the gradient of an equilibrium takes to compile, and that it is compiled once.

    python -m experiments.benchmarks.compile_time --output compile.json

Time to trace, lower and compile ``jit(grad(solve))``, all caches emptied before, in turns; no
persistent cache. And the number of programs that a second eager call of ``jdeq.deq``, and of its
gradient, compiles with the same functions and shapes: none.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jdeq
from experiments.benchmarks import jax_solvers
from experiments.benchmarks.problems import PROBLEMS, Problem
from experiments.benchmarks.timing import spread, surroundings

CONTESTANTS = {
    "jdeq": (
        ("Picard", "the default"),
        ("Anderson(5), the default", "the default"),
        ("Broyden", "the default"),
    ),
    "jaxopt": (
        ("Picard", "normal CG, the default"),
        ("Picard", "GMRES"),
        ("Picard", "Picard"),
        ("Anderson(5)", "normal CG, the default"),
        ("Anderson(5)", "GMRES"),
        ("Broyden", "GMRES"),
    ),
    "optimistix": (("Picard", "GMRES"), ("Picard", "BiCGStab"), ("Newton, GMRES", "GMRES")),
}
"""Solver and backward solver of each row."""

PARTS = ("trace", "lower", "compile", "total")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: JSON file to write.
        problems: which problems.
        libraries: which libraries.
        repeats: rounds; each compiles every contestant once.
        batch: problems a batch; None is 256, and 48 for mnist.
    """

    output: Path
    problems: tuple[str, ...] = ("dense", "mnist")
    libraries: tuple[str, ...] = tuple(CONTESTANTS)
    repeats: int = 5
    batch: int | None = None


def main(options: Options) -> None:
    """Print and write the result."""
    jax.config.update("jax_enable_compilation_cache", False)
    rows = {}
    for name in options.problems:
        problem = PROBLEMS[name]() if options.batch is None else PROBLEMS[name](options.batch)
        rows[name] = {
            "compile": compile_times(problem, options.repeats, options.libraries),
            "programs_of_second_call": second_call(problem),
        }
    result = {
        "repeats": options.repeats,
        **surroundings("jaxopt", "optimistix", "lineax"),
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


def compile_times(problem: Problem, repeats: int, libraries: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of each part of each contestant."""
    programs: dict[str, Callable[[], tuple[Callable, ...]]] = {}
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed and left out")
            continue
        known = {c.name: c for c in getattr(jax_solvers, f"{library}_contestants")()}
        for solver, backward in CONTESTANTS[library]:
            programs[f"{library}/{solver} | {backward}"] = functools.partial(
                known[solver].programs, problem, backward
            )
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            samples[name].append(parts(program()[1], problem))
    rows = {}
    for name, values in samples.items():
        rows[name] = {part: spread([v[part] for v in values], 3) for part in PARTS}
        medians = ", ".join(f"{part} {rows[name][part]['median']:.2f}" for part in PARTS)
        print(f"{problem.name:6s} {name:52s} {medians} s", flush=True)
    return rows


def parts(program: Callable, problem: Problem) -> dict[str, float]:
    """Seconds to trace, lower and compile a jitted function, starting with empty caches."""
    given = (problem.params, problem.x, problem.z0, problem.weights)
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = program.trace(*given, 1e-5, 1e-5)  # type: ignore[attr-defined]
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    durations = [b - a for a, b in itertools.pairwise(times)]
    return dict(zip(PARTS, [*durations, times[-1] - times[0]], strict=True))


def second_call(problem: Problem) -> dict[str, int]:
    """Programs compiled by a second eager solve, and by the second eager gradient of one."""
    injected = jax.block_until_ready(problem.inject(problem.params, problem.x))

    def solve(params: Any, injected: Any) -> Any:
        return jdeq.deq(problem.cell, params, injected, problem.z0, rtol=1e-3, max_steps=30).value

    def loss(params: Any, injected: Any) -> Any:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(solve(params, injected)))

    counts = {}
    for name, run in {"solve": solve, "gradient": jax.grad(loss)}.items():
        call = functools.partial(run, problem.params, injected)
        first = count_compiled(call)
        counts[name] = count_compiled(call)
        print(
            f"{problem.name:6s} eager {name}: {first} programs compiled by the first call, "
            f"{counts[name]} by the second",
            flush=True,
        )
    return counts


_compiled: list[str] = []


def count_compiled(run: Callable[[], Any]) -> int:
    """How many programs the compiler is given while ``run`` runs."""
    if not _compiled:
        # Listeners cannot be taken off: there is one, and its list is never empty again.
        _compiled.append("listening")
        jax.monitoring.register_event_duration_secs_listener(_note)
    before = len(_compiled)
    jax.block_until_ready(run())
    return len(_compiled) - before


def _note(event: str, duration_secs: float, **details: str | int) -> None:
    del duration_secs, details
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


if __name__ == "__main__":
    main(tyro.cli(Options))
