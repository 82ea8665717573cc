"""Errors of every solver, gradient and transform on problems whose derivatives are known.

    python -m experiments.benchmarks.exactness --output exactness.json --table exactness.md

In float64. The small problems are solved in one batch, each on its own rows, so that one program
serves all of them. Gradients that look at nothing but the solution are tried with few solvers.
An error is relative to the largest entry of the reference. What is exact must be within 1e-6; what
is biased by design shows its bias; what is refused shows the exception.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import tyro
from jax import Array

import jdeq
from experiments.benchmarks.exact_problems import GROUPS, Problem, random_like
from experiments.benchmarks.timing import surroundings
from jdeq.solvers import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    FromJaxopt,
    NewtonKrylov,
    Picard,
    Reversible,
)

PyTree = Any

LIMIT = 1e-6
"""Largest relative error of an exact derivative."""

UNSOLVED = 1e-9
"""A problem whose relative residual is larger is not solved."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        output: JSON file to write.
        table: Markdown file to write.
        problems: Groups of them: "small", "convolutional", "multiscale".
        solvers: Names of the solvers; all by default.
        adjoints: Names of the gradients; all by default.
    """

    output: Path
    table: Path
    problems: tuple[str, ...] = tuple(GROUPS)
    solvers: tuple[str, ...] = ()
    adjoints: tuple[str, ...] = ()


SOLVERS = {
    "Picard": Picard(),
    "Anderson II": Anderson(),
    "Anderson I": Anderson(kind="I"),
    "Broyden good": Broyden(),
    "Broyden bad": Broyden(kind="bad"),
    "NewtonKrylov": NewtonKrylov(),
    "Reversible": Reversible(0.8),
    "FromJaxopt": FromJaxopt(jaxopt.AndersonAcceleration),
    "FromJaxopt, Picard": FromJaxopt(jaxopt.FixedPointIteration),
    "FromJaxopt, Broyden": FromJaxopt(jaxopt.Broyden),
}

ADJOINTS = {
    "Implicit": jdeq.adjoints.Implicit(),
    "Implicit, GMRES": jdeq.adjoints.Implicit(GMRES()),
    "Implicit, BiCGStab": jdeq.adjoints.Implicit(BiCGStab()),
    "ImplicitForward": jdeq.adjoints.ImplicitForward(),
    "Unrolled": jdeq.adjoints.Unrolled(),
    "Reversible": jdeq.adjoints.Reversible(),
    "Shine": jdeq.adjoints.Shine(),
    "Phantom": jdeq.adjoints.Phantom(),
    "JacobianFree": jdeq.adjoints.JacobianFree(),
}

BIASED = ("Shine", "Phantom", "JacobianFree", "Unrolled")
"""Not derivatives of the solution: those of the iteration that found it are near, but not equal."""

OF_SOLUTION = ("Implicit, GMRES", "Implicit, BiCGStab", "Phantom", "JacobianFree")
"""Gradients that look at nothing but the solution: the solver that found it does not matter."""

FEW_SOLVERS = ("Picard", "Anderson II")
"""Also what convolutional cells are solved with, whose programs take long to compile."""

OF_STEPS = ("Unrolled", "Reversible")
"""Gradients of every step: these get few steps, and problems that need more are called so."""

MOST_STEPS, FEW_STEPS = 400_000, 500


def outer(z: PyTree, size: PyTree) -> Array:
    """A loss of states in units of their size, whose second derivative is not constant.

    The sine of a state of 1e4 would turn what its solve leaves, 1e-9 of it, into 1e-5.
    """
    units = jax.tree.leaves(jax.tree.map(jnp.divide, z, size))
    return jnp.sum(jnp.stack([jnp.sum(jnp.sin(u) + 0.1 * u**2) for u in units]))


def size_of(z: PyTree) -> PyTree:
    """The largest entry of each row: [B, 1, ...] a leaf."""
    return jax.tree.map(
        lambda leaf: jnp.max(jnp.abs(leaf), axis=tuple(range(1, leaf.ndim)), keepdims=True), z
    )


Loss = Callable[[Array], Array]
"""A function of two numbers a problem, ``[problems, 2]``."""


def along(problems: list[Problem], solve: Callable[[list, list], list]) -> Loss:
    """The loss along a direction of each problem's parameters and one of its inputs."""
    pairs = [(p.params, p.x) for p in problems]
    directions = random_like(pairs, jax.random.key(9))
    sizes = [size_of(p.answer(p.params, p.x)) for p in problems]

    def loss(t: Array) -> Array:
        # Small changes of a rate near one are large changes of the solution.
        moved = [
            jax.tree.map(lambda v, d, s=s: v + 0.1 * s * d, value, direction)
            for pair, pair_direction, steps in zip(pairs, directions, t, strict=True)
            for value, direction, s in zip(pair, pair_direction, steps, strict=True)
        ]
        states = solve(moved[::2], moved[1::2])
        return jnp.sum(jnp.stack([outer(*each) for each in zip(states, sizes, strict=True)]))

    return loss


def transforms(loss: Loss, count: int, forward: bool) -> dict[str, Callable[[], Array]]:
    """Derivatives of the loss, each computed when called, ``[..., problems, 2]``."""
    gradient = jax.grad(loss)
    hessian = jax.hessian(loss) if forward else jax.jacrev(gradient)
    at = jnp.zeros((count, 2))
    several = jnp.stack([at, at + jnp.array([1e-6, -1e-6])])
    return {
        "grad": lambda: gradient(at),
        "jit": lambda: jax.jit(gradient)(at),
        "vmap(grad)": lambda: jax.jit(jax.vmap(gradient))(several),
        "jvp": lambda: jax.jit(jax.jacfwd(loss))(at),
        "hessian": lambda: jax.jit(hessian)(at),
    }


COLUMNS = ("grad", "jit", "vmap(grad)", "jvp", "hessian")


def batched(problems: list[Problem], **options: Any) -> Callable[[list, list], jdeq.Solution]:
    """All problems in one equilibrium, each on its own rows."""
    starts = [p.z0 for p in problems]
    rows = np.cumsum([len(jax.tree.leaves(z0)[0]) for z0 in starts])[:-1].tolist()

    def split(z: PyTree) -> list[PyTree]:
        parts = [jnp.split(leaf, rows) for leaf in jax.tree.leaves(z)]
        structure = jax.tree.structure(starts[0])
        return [jax.tree.unflatten(structure, part) for part in zip(*parts, strict=True)]

    def cell(given: tuple[list, list], z: PyTree) -> PyTree:
        images = [
            p.cell(params, part, x)
            for p, params, x, part in zip(problems, *given, split(z), strict=True)
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *images)

    z0 = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *starts)

    def solve(params: list, xs: list) -> jdeq.Solution:
        solution = jdeq.fixed_point(cell, (params, xs), z0, rtol=1e-13, atol=1e-13, **options)
        return dataclasses.replace(solution, aux=split(solution.value))

    return solve


def answers(problems: list[Problem]) -> Callable[[list, list], list]:
    """The known solutions of all problems."""
    return lambda params, xs: [
        problem.answer(q, x) for problem, q, x in zip(problems, params, xs, strict=True)
    ]


def cases(group: str, options: Options) -> Iterator[tuple[str, str]]:
    """Solver and gradient of every row."""
    for solver in options.solvers or SOLVERS:
        for adjoint in options.adjoints or ADJOINTS:
            few = adjoint in OF_SOLUTION or group != "small"
            if not few or solver in FEW_SOLVERS:
                yield solver, adjoint


def measure(
    problems: dict[str, Problem], reference: dict[str, np.ndarray], solver: str, adjoint: str
) -> dict[str, dict[str, float | str]]:
    """Errors of all transforms for every problem, or why there is none."""
    steps = FEW_STEPS if adjoint in OF_STEPS else MOST_STEPS
    solve = batched(
        list(problems.values()), solver=SOLVERS[solver], adjoint=ADJOINTS[adjoint], max_steps=steps
    )
    loss = along(list(problems.values()), lambda params, xs: solve(params, xs).aux)
    derivatives = transforms(loss, len(problems), forward=adjoint == "ImplicitForward")
    errors: dict[str, dict[str, float | str]] = {name: {} for name in problems}
    for transform, compute in derivatives.items():
        try:
            got = np.asarray(compute())
        except (TypeError, ValueError, NotImplementedError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            for name in problems:
                errors[name][transform] = reason
            continue
        for i, name in enumerate(problems):
            errors[name][transform] = relative_error(
                got[..., i, :], reference[transform][..., i, :]
            )
    for name, text in unfinished(problems, solver, steps).items():
        errors[name] = {
            key: error if isinstance(error, str) else text for key, error in errors[name].items()
        }
    return errors


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error over the largest entry."""
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def unfinished(problems: dict[str, Problem], solver: str, steps: int) -> dict[str, str]:
    """Which problems the solver does not solve: of these no derivative is claimed."""
    found = {}
    for name, problem in problems.items():
        try:
            solution = batched([problem], solver=SOLVERS[solver], max_steps=steps)(
                [problem.params], [problem.x]
            )
        except ValueError:
            continue
        size = sum(jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(solution.value))
        residual = float(jnp.max(solution.residual) / size)
        if residual > UNSOLVED:
            worst = jdeq.Result(int(jnp.max(solution.result))).name
            found[name] = f"unconverged: {worst}, residual {residual:.0e} after {steps} steps"
    return found


def main(options: Options) -> None:
    """Measure all cases, print and write them; fail if an exact one is not."""
    jax.config.update("jax_enable_x64", True)
    rows: dict[str, dict[str, dict[str, float | str]]] = {}
    started = time.perf_counter()
    for group in options.problems:
        problems = {name: make() for name, make in GROUPS[group].items()}
        exact = along(list(problems.values()), answers(list(problems.values())))
        reference = {
            name: np.asarray(compute())
            for name, compute in transforms(exact, len(problems), forward=True).items()
        }
        for solver, adjoint in cases(group, options):
            errors = measure(problems, reference, solver, adjoint)
            rows.setdefault(f"{solver} | {adjoint}", {}).update(errors)
            print(
                f"{time.perf_counter() - started:6.0f} s  {solver} | {adjoint}: {errors}",
                flush=True,
            )
    wrong = list(violations(rows))
    result = surroundings("flax", "jaxopt") | {"limit": LIMIT, "rows": rows, "wrong": wrong}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    options.table.write_text(table(rows))
    print("\n".join(wrong) or f"all exact derivatives are within {LIMIT}")
    raise SystemExit(bool(wrong))


def violations(rows: dict) -> Iterator[str]:
    """What is claimed to be exact and is not."""
    for row, problems in rows.items():
        for problem, errors in problems.items():
            for transform, error in errors.items():
                exact = row.split(" | ")[1] not in BIASED
                if exact and not isinstance(error, str) and not error <= LIMIT:
                    yield f"{row} | {problem} | {transform}: {error:.1e}"


def table(rows: dict) -> str:
    """Markdown: the worst error over the problems, and the problem that it belongs to."""
    lines = [f"| solver | gradient | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row, problems in rows.items():
        entries = [summary({name: errors[c] for name, errors in problems.items()}) for c in COLUMNS]
        lines.append(f"| {row} | {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def summary(errors: dict[str, float | str]) -> str:
    """One entry of the table."""
    numbers = {name: e for name, e in errors.items() if not isinstance(e, str)}
    unconverged = [name for name, e in errors.items() if str(e).startswith("unconverged")]
    refused = [name for name in errors if name not in numbers and name not in unconverged]
    parts = []
    if numbers:
        worst = max(numbers, key=lambda name: numbers[name])
        parts.append(f"{numbers[worst]:.0e} {worst}")
    if unconverged:
        parts.append(f"unconverged: {', '.join(unconverged)}")
    if refused:
        parts.append("refused" if not numbers else f"refused: {', '.join(refused)}")
    return "; ".join(parts)


if __name__ == "__main__":
    main(tyro.cli(Options))
