"""Errors of every solver, gradient and transform on problems whose derivatives are known.

    python -m experiments.benchmarks.exactness --output exactness.json --table exactness.md

In float64. The reference is a closed form where there is one, else two Newton steps with the dense
Jacobian from the solution held constant, whose first three derivatives are those of the solution.
An error is relative to the largest entry of the reference. What is exact must be within 1e-6; what
is biased by design shows its bias; what is refused shows the exception.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import jaxopt
import numpy as np
import tyro
from flax import nnx
from jax import Array

import jdeq
from experiments.benchmarks.timing import surroundings
from jdeq.nn import MultiscaleCell
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


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        output: JSON file to write.
        table: Markdown file to write.
        problems: Names of the problems; all by default.
        solvers: Names of the solvers; all by default.
        adjoints: Names of the gradients; all by default.
    """

    output: Path
    table: Path
    problems: tuple[str, ...] = ()
    solvers: tuple[str, ...] = ()
    adjoints: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Problem:
    """``z = cell(params, z, x)`` with its solution as a differentiable function.

    Attributes:
        cell: the cell.
        answer: ``answer(params, x) -> z*``.
        params: its parameters.
        x: its inputs.
        z0: the start.
        max_steps: enough for Picard.
    """

    cell: Callable[[PyTree, PyTree, PyTree], PyTree]
    answer: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    x: PyTree
    z0: PyTree
    max_steps: int


def linear() -> Problem:
    """``z = W z + U x``, a contraction of 0.8 that is not symmetric."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (6, 6))
    params = {"w": 0.8 * w / jnp.linalg.norm(w, 2), "u": jax.random.normal(keys[1], (6, 4))}

    def answer(params: PyTree, x: Array) -> Array:
        return jnp.linalg.solve(jnp.eye(6) - params["w"], params["u"] @ x.T).T

    def cell(params: PyTree, z: Array, x: Array) -> Array:
        return z @ params["w"].T + x @ params["u"].T

    x = jax.random.normal(keys[2], (3, 4))
    return Problem(cell, answer, params, x, jnp.zeros((3, 6)), 300)


def conditioned() -> Problem:
    """``z = rate z + shift``, the condition number ``1 / (1 - rate)`` from 1.1 to 1e4."""
    rate = 1 - 1 / jnp.array([1.1, 10.0, 1e2, 1e3, 1e4])[:, None]
    shift = jax.random.normal(jax.random.key(1), (5, 3))
    weights = jnp.array([0.5, 1.0, 0.9])
    return Problem(
        lambda params, z, x: x["rate"] * weights * z + params * x["shift"],
        lambda params, x: params * x["shift"] / (1 - x["rate"] * weights),
        jnp.asarray(1.3),
        {"rate": rate, "shift": shift},
        jnp.zeros((5, 3)),
        400_000,
    )


def root() -> Problem:
    """``z = sqrt(z + p x)``, solved by ``(1 + sqrt(1 + 4 p x)) / 2``."""
    x = jnp.array([[0.5], [2.0], [30.0]])
    return Problem(
        lambda params, z, x: jnp.sqrt(z + params * x),
        lambda params, x: (1 + jnp.sqrt(1 + 4 * params * x)) / 2,
        jnp.asarray(0.8),
        x,
        jnp.ones((3, 1)),
        200,
    )


def dense() -> Problem:
    """A tanh cell of 8 units with a spectral norm of 0.9."""
    keys = jax.random.split(jax.random.key(2), 4)
    w = jax.random.normal(keys[0], (8, 8))
    params = {
        "w": 0.9 * w / jnp.linalg.norm(w, 2),
        "u": jax.random.normal(keys[1], (4, 8)),
        "b": jax.random.normal(keys[2], (8,)),
    }

    def cell(params: PyTree, z: Array, x: Array) -> Array:
        return jnp.tanh(z @ params["w"].T + x @ params["u"] + params["b"])

    x, z0 = jax.random.normal(keys[3], (3, 4)), jnp.zeros((3, 8))
    return Problem(cell, partial(by_newton, cell, z0), params, x, z0, 500)


def convolutional() -> Problem:
    """The multiscale cell of ``jdeq.nn``: two branches of 8 channels, at 4x4 and 2x2."""
    model = MultiscaleCell(
        (8, 8), expansion=1, state_scale=0.5, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(model)
    shapes = model.shapes(1, (4, 4))
    z0 = tuple(jnp.zeros(shape) for shape in shapes)

    def cell(params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        return nnx.merge(graph, params)(z, x)

    x = random_like(z0, jax.random.key(3))
    return Problem(cell, partial(by_newton, cell, z0), params, x, z0, 300)


PROBLEMS = {
    "linear": linear,
    "conditioned": conditioned,
    "root": root,
    "dense": dense,
    "convolutional": convolutional,
}

SOLVERS = {
    "Picard": Picard(),
    "Anderson II": Anderson(),
    "Anderson I": Anderson(kind="I"),
    "Broyden good": Broyden(),
    "Broyden bad": Broyden(kind="bad"),
    "NewtonKrylov": NewtonKrylov(),
    "Reversible": Reversible(0.8),
    "FromJaxopt": FromJaxopt(jaxopt.AndersonAcceleration),
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

BIASED = ("Shine", "Phantom", "JacobianFree")

MEMORY_PER_STEP = ("Unrolled", "Reversible")
"""Gradients of every step: these get few steps, and problems that need more are called so."""

FEW_STEPS = 2000


def by_newton(cell: Callable, z0: PyTree, params: PyTree, x: PyTree) -> PyTree:
    """The solution by Newton's method, with derivatives of up to third order."""
    start, restore = jax.flatten_util.ravel_pytree(z0)

    def residual(z: Array, params: PyTree, x: PyTree) -> Array:
        return jax.flatten_util.ravel_pytree(cell(params, restore(z), x))[0] - z

    def newton(z: Array, params: PyTree, x: PyTree) -> Array:
        jacobian = jax.jacfwd(residual)(z, params, x)
        return z - jnp.linalg.solve(jacobian, residual(z, params, x))

    fixed = jax.lax.stop_gradient((params, x))
    z = jax.lax.fori_loop(
        0, 2000, lambda _, z: z + residual(z, *fixed), jax.lax.stop_gradient(start)
    )
    for _ in range(4):
        z = newton(z, *fixed)
    z = jax.lax.stop_gradient(z)
    for _ in range(2):
        z = newton(z, params, x)
    return restore(z)


def random_like(tree: PyTree, key: Array) -> PyTree:
    """Normal numbers in the shapes of ``tree``."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, jnp.shape(v)) for k, v in zip(keys, leaves, strict=True)]
    )


def outer(z: PyTree) -> Array:
    """A loss whose second derivative is not constant."""
    return sum(jnp.sum(jnp.sin(leaf) + 0.1 * leaf**2) for leaf in jax.tree.leaves(z))


def along(problem: Problem, solve: Callable[[PyTree, PyTree], PyTree]) -> Callable[[Array], Array]:
    """The loss as a function of two numbers, along directions of the parameters and the inputs."""
    d_params, d_x = random_like((problem.params, problem.x), jax.random.key(9))
    # Small changes of a rate near one are large changes of the solution.
    scale = 0.1

    def loss(t: Array) -> Array:
        params = jax.tree.map(lambda v, d: v + scale * t[0] * d, problem.params, d_params)
        x = jax.tree.map(lambda v, d: v + scale * t[1] * d, problem.x, d_x)
        return outer(solve(params, x))

    return loss


AT = (0.0, 0.0)
SEVERAL = (AT, (1e-6, -1e-6))


def transforms(loss: Callable[[Array], Array], forward: bool) -> dict[str, Callable[[], Array]]:
    """Derivatives of the loss, each computed when called."""
    gradient = jax.grad(loss)
    hessian = jax.hessian(loss) if forward else jax.jacrev(gradient)
    return {
        "grad": lambda: gradient(jnp.array(AT)),
        "jit": lambda: jax.jit(gradient)(jnp.array(AT)),
        "vmap(grad)": lambda: jax.jit(jax.vmap(gradient))(jnp.array(SEVERAL)),
        "jvp": lambda: jax.jit(jax.jacfwd(loss))(jnp.array(AT)),
        "hessian": lambda: jax.jit(hessian)(jnp.array(AT)),
    }


COLUMNS = tuple(transforms(lambda t: t[0], True))


def cases(options: Options) -> Iterator[tuple[str, str, str]]:
    """Solver, gradient and problem of every row's entries."""
    for solver in options.solvers or SOLVERS:
        for adjoint in options.adjoints or ADJOINTS:
            for problem in options.problems or PROBLEMS:
                yield solver, adjoint, problem


def measure(
    problem: Problem, reference: dict[str, np.ndarray], solver: str, adjoint: str
) -> dict[str, float | str]:
    """Errors of all transforms of one case, or why there is none."""
    steps = FEW_STEPS if adjoint in MEMORY_PER_STEP else problem.max_steps
    steps = min(steps, problem.max_steps)

    def solve(params: PyTree, x: PyTree) -> jdeq.Solution:
        return jdeq.deq(
            problem.cell, params, x, problem.z0, solver=SOLVERS[solver],
            adjoint=ADJOINTS[adjoint], rtol=1e-13, atol=1e-13, max_steps=steps,
        )  # fmt: skip

    errors: dict[str, float | str] = {}
    derivatives = transforms(
        along(problem, lambda params, x: solve(params, x).value), adjoint == "ImplicitForward"
    )
    for name, compute in derivatives.items():
        try:
            got = np.asarray(compute())
        except (TypeError, ValueError, NotImplementedError) as error:
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        errors[name] = float(
            np.max(np.abs(got - reference[name])) / np.max(np.abs(reference[name]))
        )
    if adjoint in MEMORY_PER_STEP:
        residual = reached(problem, solver, steps)
        if residual > 1e-9:
            errors = dict.fromkeys(errors, f"unconverged: residual {residual:.0e} in {steps} steps")
    return errors


def reached(problem: Problem, solver: str, steps: int) -> float:
    """Largest relative residual of the solve alone."""
    solution = jdeq.deq(
        problem.cell, problem.params, problem.x, problem.z0, solver=SOLVERS[solver],
        rtol=1e-13, atol=1e-13, max_steps=steps,
    )  # fmt: skip
    size = sum(jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(solution.value))
    return float(jnp.max(solution.residual) / size)


def main(options: Options) -> None:
    """Measure all cases, print and write them; fail if an exact one is not."""
    jax.config.update("jax_enable_x64", True)
    problems = {name: make() for name, make in PROBLEMS.items()}
    references = {
        name: {
            key: np.asarray(compute())
            for key, compute in transforms(along(problem, problem.answer), True).items()
        }
        for name, problem in problems.items()
        if name in (options.problems or PROBLEMS)
    }
    rows: dict[str, dict[str, dict[str, float | str]]] = {}
    started = time.perf_counter()
    for solver, adjoint, name in cases(options):
        errors = measure(problems[name], references[name], solver, adjoint)
        rows.setdefault(f"{solver} | {adjoint}", {})[name] = errors
        print(f"{time.perf_counter() - started:6.0f} s  {solver} | {adjoint} | {name}: {errors}")
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
    texts = {name: e for name, e in errors.items() if isinstance(e, str)}
    if not numbers:
        kinds = {
            "unconverged" if e.startswith("unconverged") else "refused" for e in texts.values()
        }
        return ", ".join(sorted(kinds))
    worst = max(numbers, key=lambda name: numbers[name])
    less = f" (not {', '.join(texts)})" if texts else ""
    return f"{numbers[worst]:.0e} {worst}{less}"


if __name__ == "__main__":
    main(tyro.cli(Options))
