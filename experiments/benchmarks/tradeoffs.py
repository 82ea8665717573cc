"""What solvers and gradients cost and what they give, on one cell: the table behind the choice.

    python -m experiments.benchmarks.tradeoffs --output tradeoffs.json --table tradeoffs.md

The cell is dense, tanh, of a given spectral norm (how strongly it contracts decides the choice), in
float32. Solvers: evaluations of the cell and time to a relative residual of 1e-5. Gradients, all
behind the same forward solve to 1e-5: time of value and gradient over that of the value alone,
error against the implicit gradient of a solve to rounding, cosine of the angle between them, and
temporary memory of the compiled program. Contestants run in turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import tyro

import jdeq
from experiments.benchmarks.problems import Problem, dense
from experiments.benchmarks.timing import in_turns, surroundings
from jdeq import adjoints, solvers

PyTree = Any

TOLERANCE = 1e-5
MAX_STEPS = 500


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: JSON file to write.
        table: Markdown file to write.
        norms: spectral norms of the cell.
        batch: problems a batch.
        units: units of the cell.
        repeats: rounds; each times every contestant once.
    """

    output: Path
    table: Path
    norms: tuple[float, ...] = (0.95, 2.0, 3.0)
    batch: int = 256
    units: int = 256
    repeats: int = 15


SOLVERS = {
    "Picard()": solvers.Picard(),
    "Anderson(2)": solvers.Anderson(2),
    "Anderson(5), the default": solvers.Anderson(),
    "Anderson(10)": solvers.Anderson(10),
    'Anderson(5, "I")': solvers.Anderson(kind="I"),
    "Broyden()": solvers.Broyden(),
    "NewtonKrylov()": solvers.NewtonKrylov(),
    "Reversible(0.8)": solvers.Reversible(0.8),
}

GRADIENTS = {
    "Implicit(), the default": (adjoints.Implicit(), solvers.Anderson()),
    "Implicit(Picard())": (adjoints.Implicit(solvers.Picard()), solvers.Anderson()),
    "Implicit(GMRES())": (adjoints.Implicit(solvers.GMRES()), solvers.Anderson()),
    "Implicit(BiCGStab())": (adjoints.Implicit(solvers.BiCGStab()), solvers.Anderson()),
    "ImplicitForward()": (adjoints.ImplicitForward(), solvers.Anderson()),
    "Unrolled()": (adjoints.Unrolled(), solvers.Anderson()),
    "Reversible()": (adjoints.Reversible(), solvers.Reversible(0.8)),
    "Phantom(5)": (adjoints.Phantom(5), solvers.Anderson()),
    "JacobianFree()": (adjoints.JacobianFree(), solvers.Anderson()),
    "Shine()": (adjoints.Shine(), solvers.Anderson()),
    "Shine(fallback=None)": (adjoints.Shine(fallback=None), solvers.Anderson()),
    "Shine(refine=5)": (adjoints.Shine(refine=5), solvers.Anderson()),
}


def main(options: Options) -> None:
    """Measure, print and write both tables."""
    columns = {}
    for norm in options.norms:
        problem = dense(options.batch, options.units, norm)
        injected = problem.inject(problem.params, problem.x)
        columns[norm] = {
            "solvers": compare_solvers(problem, injected, options.repeats),
            "gradients": compare_gradients(problem, injected, options.repeats),
        }
    result = surroundings("flax") | {"options": {"batch": options.batch, "units": options.units}}
    options.output.write_text(json.dumps(result | {"columns": columns}, indent=2) + "\n")
    text = table(columns)
    options.table.write_text(text)
    print(text)


def compare_solvers(problem: Problem, injected: PyTree, repeats: int) -> dict[str, dict]:
    """Evaluations, time and outcome of every solver."""

    def run(solver: Any) -> Callable[[], jdeq.Solution]:
        return lambda: jdeq.deq(
            problem.cell, problem.params, injected, problem.z0, solver=solver,
            rtol=TOLERANCE, atol=0.0, max_steps=MAX_STEPS,
        )  # fmt: skip

    runs = {name: run(solver) for name, solver in SOLVERS.items()}
    samples = in_turns(runs, repeats)
    base = np.asarray(samples["Anderson(5), the default"].cpu)
    rows = {}
    for name, solve in runs.items():
        solution = solve()
        rows[name] = {
            "evaluations": float(jnp.mean(solution.steps)),
            "converged": float(jnp.mean(solution.converged)),
            "time": float(np.median(np.asarray(samples[name].cpu) / base)),
        }
    return rows


def compare_gradients(problem: Problem, injected: PyTree, repeats: int) -> dict[str, dict]:
    """Time, error and memory of every gradient."""

    def loss(params: PyTree, adjoint: Any, solver: Any, rtol: float) -> jax.Array:
        solution = jdeq.deq(
            problem.cell, params, injected, problem.z0, solver=solver, adjoint=adjoint,
            rtol=rtol, atol=0.0, max_steps=MAX_STEPS,
        )  # fmt: skip
        return jnp.vdot(problem.weights, solution.value)

    def value_of(solver: Any) -> Callable[[], jax.Array]:
        return jax.jit(lambda: loss(problem.params, adjoints.Implicit(), solver, TOLERANCE))

    exact = flat(jax.grad(loss)(problem.params, adjoints.Implicit(), solvers.Anderson(), 1e-7))
    gradients: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, (adjoint, solver) in GRADIENTS.items():
        gradients[name] = jax.jit(jax.grad(loss), static_argnums=(1, 2))
        runs[name] = partial(gradients[name], problem.params, adjoint, solver, TOLERANCE)
        runs[f"value of {name}"] = value_of(solver)
    samples = in_turns(runs, repeats)
    rows = {}
    for name, (adjoint, solver) in GRADIENTS.items():
        got = flat(runs[name]())
        whole, alone = (np.asarray(samples[key].cpu) for key in (name, f"value of {name}"))
        compiled = gradients[name].lower(problem.params, adjoint, solver, TOLERANCE).compile()
        memory: Any = compiled.memory_analysis()
        rows[name] = {
            "time": float(np.median(whole / alone)),
            "error": float(np.linalg.norm(got - exact) / np.linalg.norm(exact)),
            "cosine": float(got @ exact / np.linalg.norm(got) / np.linalg.norm(exact)),
            "megabytes": memory.temp_size_in_bytes / 2**20,
        }
    return rows


def flat(tree: PyTree) -> np.ndarray:
    """All entries in one vector."""
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0], np.float64)


def table(columns: dict[float, dict]) -> str:
    """Both tables in Markdown, one column a norm."""
    norms = list(columns)
    head = " | ".join(f"norm {norm}" for norm in norms)
    lines = [f"| solver | {head} |", "|---" * (1 + len(norms)) + "|"]
    for name in SOLVERS:
        cells = [solver_entry(columns[norm]["solvers"][name]) for norm in norms]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", f"| gradient | {head} | memory |", "|---" * (2 + len(norms)) + "|"]
    for name in GRADIENTS:
        rows = [columns[norm]["gradients"][name] for norm in norms]
        cells = [f"{r['time']:.2f}; {r['error']:.0e}; {r['cosine']:.3f}" for r in rows]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {rows[0]['megabytes']:.1f} MiB |")
    return "\n".join(lines) + "\n"


def solver_entry(row: dict) -> str:
    """Evaluations and relative time; the share that converged unless all did."""
    share = "" if row["converged"] == 1 else f" ({100 * row['converged']:.0f} % converged)"
    return f"{row['evaluations']:.0f}; {row['time']:.2f}{share}"


if __name__ == "__main__":
    main(tyro.cli(Options))
