"""jdeq against jaxopt, optimistix, banax and torchdeq: time to an answer of a given accuracy.

    python -m experiments.benchmarks.peers --output peers.json

All contestants solve the same problems (`experiments.benchmarks.problems`) in one process, in
turns, in float32. The goal is a relative residual of 1e-5 in *every* problem of the batch, checked
on the answer itself: of the state, and for gradients of the adjoint equation too. jdeq stops by
that criterion. The others stop by norms of their own, usually one for the whole batch, so for each
the loosest tolerance is found by bisection whose answer still passes: they stop as early as they
may. What does not pass at any tolerance is listed with what it reached, and not timed.

Forward: every solver of every library. Gradient (in parameters and inputs): each library's fastest
solver of the forward column that has a gradient, with each of its backward solvers. What is not
installed is left out and said so. banax needs Python 3.12. torch computes with one thread or with
all cores, whichever evaluates the cell faster at the start of each problem. Where JAX has several
devices (`JAX_NUM_CPU_DEVICES=2` makes one of each of two cores), each holds a part of the batch.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.benchmarks import jax_solvers
from experiments.benchmarks.jax_solvers import Scale
from experiments.benchmarks.problems import PROBLEMS, Judge, Problem, spread_over_devices
from experiments.benchmarks.timing import in_turns, spread, surroundings

GOAL = 1e-5
ROUNDING = 1.01
"""The check evaluates the cell in a program of its own, which rounds differently."""

LIBRARIES = ("jdeq", "jaxopt", "optimistix", "banax", "torchdeq")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        output: JSON file to write.
        problems: which problems.
        libraries: which libraries.
        repeats: rounds at most; each times every contestant once.
        seconds: after so many in a column no further round begins (5 there are at least).
        gradients: whether to time gradients too.
        batch: problems a batch; None is 256, and 48 for mnist.
        exclude: parts of the names of rows that are left out.
    """

    output: Path
    problems: tuple[str, ...] = tuple(PROBLEMS)
    libraries: tuple[str, ...] = LIBRARIES
    repeats: int = 50
    seconds: float = 90
    gradients: bool = True
    batch: int | None = None
    exclude: tuple[str, ...] = ()

    def leaves_out(self, label: str) -> bool:
        """Whether a row is left out."""
        return any(part in label for part in self.exclude)


@dataclasses.dataclass
class Entry:
    """One row: a contestant with its tolerance, and what came of it.

    Attributes:
        contestant: who.
        backward: its backward solver, None in the forward column.
        tolerance: the loosest that passes; None where none does.
        forward_tolerance: that of the forward solve, in the gradient column.
        residual: the worst relative residual of the answer, or of its adjoint equation.
        error: what it raised, if it did.
        samples: seconds of each round.
        cpu: seconds of all threads, of each round.
    """

    contestant: Any
    backward: str | None = None
    tolerance: float | None = None
    forward_tolerance: float = 0.0
    residual: float = float("inf")
    error: str | None = None
    samples: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """Library, solver and backward solver."""
        name = f"{self.contestant.library}/{self.contestant.name}"
        return name if self.backward is None else f"{name} | {self.backward}"

    def record(self) -> dict[str, Any]:
        """The row for the JSON file."""
        row = {
            "library": self.contestant.library,
            "solver": self.contestant.name,
            "backward": self.backward,
            "passes": self.tolerance is not None,
            "tolerance": self.tolerance,
            "forward_tolerance": self.forward_tolerance,
            "residual": float(f"{self.residual:.3g}") if np.isfinite(self.residual) else None,
        }
        if self.error:
            row["error"] = self.error
        if self.samples:
            row["seconds"] = {**spread(self.samples), "rounds": len(self.samples)}
            row["cpu_seconds"] = spread(self.cpu)
        return row


def main(options: Options) -> None:
    """Run all columns; print and write them."""
    contestants, absent = gather(options.libraries)
    columns: dict[str, Any] = {}
    for name in options.problems:
        problem = PROBLEMS[name]() if options.batch is None else PROBLEMS[name](options.batch)
        problem = spread_over_devices(problem)
        for contestant in contestants:
            contestant.prepare(problem)
        forward = forward_column(problem, contestants, options)
        columns[f"{name}, forward"] = report(f"{name}, forward", forward)
        write(options, columns, absent)
        if options.gradients:
            gradient = gradient_column(problem, forward, options)
            columns[f"{name}, gradient"] = report(f"{name}, gradient", gradient)
            write(options, columns, absent)


def gather(libraries: tuple[str, ...]) -> tuple[list[Any], list[str]]:
    """The contestants of what is installed, and the libraries that are not."""
    contestants: list[Any] = []
    absent = []
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError:
            absent.append(library)
            print(f"{library} is not installed and left out")
            continue
        if library == "torchdeq":
            from experiments.benchmarks import torch_solvers

            contestants += torch_solvers.contestants()
        else:
            contestants += getattr(jax_solvers, f"{library}_contestants")()
    return contestants, absent


def forward_column(problem: Problem, contestants: list[Any], options: Options) -> list[Entry]:
    """Tune, check and time every solver."""
    judge = Judge(problem)
    entries = [Entry(contestant) for contestant in contestants]
    entries = [entry for entry in entries if not options.leaves_out(entry.label)]
    for entry in entries:
        tune(entry, state_measure(problem, judge, entry), entry.contestant.scale_for(problem))
    runs = {
        entry.label: entry.contestant.forward(problem, entry.tolerance)
        for entry in entries
        if entry.tolerance is not None
    }
    return timed(entries, runs, options)


def gradient_column(problem: Problem, forward: list[Entry], options: Options) -> list[Entry]:
    """Tune, check and time each library's fastest solver with all its backward solvers."""
    judge = Judge(problem)
    entries = []
    for best in fastest([e for e in forward if e.contestant.has_gradient(problem)]).values():
        for backward in best.contestant.backwards:
            entry = Entry(best.contestant, backward, forward_tolerance=best.tolerance or 0.0)
            if options.leaves_out(entry.label):
                continue
            entries.append(entry)
            tune_gradient(problem, judge, entry)
    runs = {
        entry.label: entry.contestant.gradient(
            problem, entry.backward, entry.forward_tolerance, entry.tolerance
        )
        for entry in entries
        if entry.tolerance is not None
    }
    check_agreement(entries, runs)
    return timed(entries, runs, options)


def tune_gradient(problem: Problem, judge: Judge, entry: Entry) -> None:
    """Finds the loosest backward tolerance, with a tighter forward solve where none passes.

    torchdeq's adjoint equation is that of the last iterate but one: its answer is no better than
    these two are near to each other.
    """
    loose = entry.forward_tolerance
    for factor in (1, 0.1, 0.01):
        entry.forward_tolerance = loose * factor
        tune(entry, adjoint_measure(problem, judge, entry), entry.contestant.backward_scale)
        if entry.tolerance is not None:
            return


def state_measure(problem: Problem, judge: Judge, entry: Entry) -> Callable[[float], float]:
    """The residual of the state as a function of the tolerance."""
    return lambda tolerance: judge.residual(entry.contestant.state(problem, tolerance))


def adjoint_measure(problem: Problem, judge: Judge, entry: Entry) -> Callable[[float], float]:
    """The residual of the adjoint equation as a function of the backward tolerance."""

    def measure(tolerance: float) -> float:
        z, u = entry.contestant.adjoint(problem, entry.backward, entry.forward_tolerance, tolerance)
        return judge.adjoint_residual(z, u)

    return measure


def tune(entry: Entry, measure: Callable[[float], float], scale: Scale | None) -> None:
    """Finds the loosest tolerance whose answer passes, and notes the residual there."""

    def attempt(tolerance: float) -> float:
        # Some libraries raise where they stop short of their tolerance: others may still do.
        try:
            return measure(tolerance)
        except Exception as error:
            entry.error = reason(error)
            return float("inf")

    tolerance, residual = (GOAL, attempt(GOAL)) if scale is None else loosest(attempt, scale)
    entry.residual = residual
    passed = residual <= ROUNDING * GOAL
    entry.tolerance = tolerance if passed else None
    entry.error = None if passed else entry.error
    print(f"  {entry.label}: tolerance {tolerance:.3g} gives {residual:.2e}", flush=True)


def reason(error: Exception) -> str:
    """The line of an error that says what happened."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    telling = [line for line in lines if "Error: " in line and "CpuCallback" not in line]
    return f"{type(error).__name__}: {(telling or lines)[0].strip()[:160]}"


def loosest(measure: Callable[[float], float], scale: Scale) -> tuple[float, float]:
    """The loosest tolerance that passes and its residual, or the best that was reached.

    From loose to tight in strides until an answer passes, then bisection of the last stride.
    """
    bad, best = scale.high, (scale.high, float("inf"))
    for tolerance in scale.strides():
        residual = measure(tolerance)
        if residual < best[1]:
            best = (tolerance, residual)
        if residual <= ROUNDING * GOAL:
            break
        bad = tolerance
    else:
        return best
    good = best[0]
    for _ in range(scale.halvings):
        middle = scale.between(good, bad)
        if middle in (good, bad):
            break
        residual = measure(middle)
        if residual <= ROUNDING * GOAL:
            good, best = middle, (middle, residual)
        else:
            bad = middle
    return best


def check_agreement(entries: list[Entry], runs: dict[str, Callable[[], Any]]) -> None:
    """Marks programs whose gradients are not those of the others: they are never the fastest.

    Leaves are compared by their norms, since the libraries lay them out differently.
    """
    norms = {label: leaf_norms(run()[0]) for label, run in runs.items()}
    if not norms:
        return
    usual = np.median(np.stack(list(norms.values())), axis=0)
    for entry in entries:
        if entry.label in norms:
            worst = float(np.max(np.abs(norms[entry.label] - usual) / usual))
            if worst > 1e-2:
                entry.error = f"a gradient's norm differs by {worst:.1e} from the median of all"
                print(f"  {entry.label}: {entry.error}", flush=True)


def leaf_norms(gradients: Any) -> np.ndarray:
    """Norms of all leaves, ascending."""
    leaves = [
        np.asarray(leaf.detach() if hasattr(leaf, "detach") else leaf, np.float64)
        for leaf in jax.tree.leaves(gradients)
    ]
    return np.sort([float(np.linalg.norm(leaf)) for leaf in leaves])


def timed(
    entries: list[Entry], runs: dict[str, Callable[[], Any]], options: Options
) -> list[Entry]:
    """The entries with the seconds of their runs."""
    samples = in_turns(runs, options.repeats, options.seconds)
    for entry in entries:
        if entry.label in samples:
            entry.samples, entry.cpu = samples[entry.label]
    return entries


def fastest(entries: list[Entry]) -> dict[str, Entry]:
    """Each library's row of the lowest minimum.

    Whatever else runs on the machine only ever adds to a time, and to the longer ones more often.
    """
    best: dict[str, Entry] = {}
    for entry in entries:
        if not entry.samples or entry.error:
            continue
        library = entry.contestant.library
        if library not in best or min(entry.samples) < min(best[library].samples):
            best[library] = entry
    return best


def report(title: str, entries: list[Entry]) -> dict[str, Any]:
    """Print one column and return it for the JSON file."""
    print(f"\n{title}")
    for entry in sorted(entries, key=lambda e: min(e.samples, default=np.inf)):
        if entry.samples:
            s = spread(np.array(entry.samples) * 1e3)
            cpu = 1e3 * min(entry.cpu)
            numbers = f"{s['min']:9.2f} ms at least, median {s['median']:.2f}, cpu {cpu:.2f}"
        else:
            numbers = "   missed" + ("" if entry.error else f", reached {entry.residual:.1e}")
        print(f"  {entry.label:62s} {numbers}" + (f"  {entry.error}" if entry.error else ""))
    best = fastest(entries)
    summary: dict[str, Any] = {}
    for library, entry in best.items():
        summary[library] = {"row": entry.label, "seconds": spread(entry.samples)}
        if "jdeq" in best:
            # Paired by round, so that what slowed all of them cancels.
            ratio = spread(np.array(entry.samples) / np.array(best["jdeq"].samples), 3)
            minima = float(f"{min(entry.samples) / min(best['jdeq'].samples):.3g}")
            summary[library] |= {"times_jdeq": ratio, "minimum_times_jdeq": minima}
            print(
                f"  best of {library:11s} {minima:.2f} times jdeq's by their minima, "
                f"{ratio['median']:.2f} by round ({ratio['min']:.2f} to {ratio['max']:.2f}): "
                f"{entry.label}"
            )
    return {"summary": summary, "rows": [entry.record() for entry in entries]}


def write(options: Options, columns: dict[str, Any], absent: list[str]) -> None:
    """Write what is there so far."""
    result = {
        "goal": GOAL,
        "excluded": options.exclude,
        "batch": options.batch or {"mnist": 48, "others": 256},
        **surroundings("jaxopt", "optimistix", "lineax", "banax", "torch", "torchdeq"),
        "absent": absent,
        "columns": columns,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
