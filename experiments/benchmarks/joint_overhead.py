"""What a joint iteration costs beyond its useful work, at the published sizes.

    python -m experiments.benchmarks.joint_overhead --output overhead.json
    python -m experiments.benchmarks.joint_overhead --case celeba --batch 4 --output overhead.json

The useful work of an iteration is one evaluation of the cell, its vector-Jacobian product in z and
x, and value and gradient of the objective in z. It is timed in a bare loop that does nothing else,
in turns with joint solves of the same problem. The cost of one iteration is the difference of a
long and a short run over the difference of their iterations, so that entering a program does not
count.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax import Array, lax

import jdeq
from experiments.adversarial import model
from experiments.common.speed import Problems
from experiments.generative import config as generative
from experiments.generative.problem import build_generator

PyTree = Any

METHODS: dict[str, Any] = {
    "Descent": jdeq.joint.Descent(step_size=0.01),
    "Polished": jdeq.joint.Polished(),
    "Accelerated, window 20": jdeq.joint.Accelerated(step_size=0.2),
}
"""What is timed against the useful work, by the name that reports give it."""


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        output: JSON file to write.
        case: The MNIST classifier under attack, or the CelebA generator.
        batch: Images a batch.
        methods: Which methods.
        short: Iterations of the short run.
        long: Iterations of the long run.
        repeats: Rounds; each times every contestant once.
    """

    output: Path
    case: Literal["mnist", "celeba"] = "mnist"
    batch: int = 48
    methods: tuple[str, ...] = tuple(METHODS)
    short: int = 4
    long: int = 24
    repeats: int = 7


def main(options: Options) -> None:
    """Time all contestants in turns, print and write the result."""
    contestants = build(options)
    for run in contestants.values():
        for iterations in (options.short, options.long):
            jax.block_until_ready(run(jnp.asarray(iterations)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repeats):
        for name, run in contestants.items():
            spent = seconds(run, options.long) - seconds(run, options.short)
            samples[name].append(spent / (options.long - options.short))
    report(samples, options)


def seconds(run: Callable[[Array], PyTree], iterations: int) -> float:
    """Wall time of one run."""
    budget = jax.block_until_ready(jnp.asarray(iterations))
    started = time.perf_counter()
    jax.block_until_ready(run(budget))
    return time.perf_counter() - started


def build(options: Options) -> dict[str, Callable[[Array], PyTree]]:
    """The bare loop and the joint solves, each a function of the number of iterations."""
    problem, at = {"mnist": mnist, "celeba": celeba}[options.case](options.batch)

    def joint(method: Any) -> Callable[[Array], PyTree]:
        return lambda budget: jdeq.joint_solve(
            problem, at.params, at.target, at.x0, at.z0, data=at.data, method=method,
            rtol=0.0, atol=0.0, max_steps=options.long, step_budget=budget,
        ).value  # fmt: skip

    useful = bare(problem, at)
    return {"useful work": useful} | {name: joint(METHODS[name]) for name in options.methods}


def bare(problem: jdeq.InputProblem, at: Problems) -> Callable[[Array], PyTree]:
    """The useful work of some iterations, in a loop that does nothing else."""
    rest = () if at.data is None else (at.data,)

    @jax.jit
    def run(iterations: Array) -> PyTree:
        def useful(k: Array, carry: tuple[PyTree, Array, PyTree]) -> tuple[PyTree, Array, PyTree]:
            del k
            z, x, mu = carry
            fz, pull_back = jax.vjp(lambda z, x: problem.cell(at.params, z, x, *rest), z, x)
            _, loss_z = jax.value_and_grad(
                lambda z: jnp.sum(problem.objective(at.params, z, x, at.target, *rest))
            )(z)
            cell_z, cell_x = pull_back(mu)
            # The sums make every result count, so that none is left out of the compiled loop.
            return fz, cell_x, jax.tree.map(jnp.add, cell_z, loss_z)

        return lax.fori_loop(0, iterations, useful, (at.z0, at.x0, at.z0))

    return run


def mnist(batch: int) -> tuple[jdeq.InputProblem, Problems]:
    """The published MNIST classifier, untrained, and perturbations in an l2 ball."""
    network = model.Classifier(model.PRESETS["mnist-published"], rngs=nnx.Rngs(0))
    graph, params = nnx.split(network)
    images = jax.random.uniform(jax.random.key(0), (batch, 28, 28, 1))

    def cell(params: PyTree, z: PyTree, x: Array, images: Array) -> PyTree:
        return nnx.merge(graph, params).cell(z, images + x)

    def objective(params: PyTree, z: PyTree, x: Array, labels: Array, images: Array) -> Array:
        del x, images
        logits = nnx.merge(graph, params).head(z)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def project(x: Array, images: Array) -> Array:
        del images
        return jdeq.projections.l2_ball(x, jnp.ones(len(x)))

    problem = jdeq.InputProblem(cell, objective, project)
    labels, z0 = jnp.arange(batch) % 10, network.initial_state(batch)
    return problem, Problems(params, labels, jnp.zeros_like(images), z0, images)


def celeba(batch: int) -> tuple[jdeq.InputProblem, Problems]:
    """The published CelebA generator, untrained, and latents of random images."""
    shape = (64, 64, 3)
    generator, params = build_generator(generative.PRESETS["celeba-published"], shape, seed=0)
    images = jax.random.uniform(jax.random.key(0), (batch, *shape))
    return generator.problem, Problems(params, images, *generator.start(params, batch))


def report(samples: dict[str, list[float]], options: Options) -> None:
    """Print ratios to the useful work, paired by round, and write the JSON file."""
    bare = np.array(samples["useful work"])
    rows = {}
    for name, values in samples.items():
        ratio = np.array(values) / bare
        rows[name] = {
            "ratio_median": float(np.median(ratio)),
            "ratio_min": float(ratio.min()),
            "ratio_max": float(ratio.max()),
            "milliseconds_median": float(1e3 * np.median(values)),
        }
        low, middle, high = (rows[name][f"ratio_{k}"] for k in ("min", "median", "max"))
        print(f"{name:24s} {middle:.2f} times the useful work ({low:.2f} to {high:.2f})")
    result = {
        "case": options.case,
        "batch": options.batch,
        "iterations": [options.short, options.long],
        "repeats": options.repeats,
        "device": str(jax.devices()[0]),
        "processor": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "jdeq": jdeq.__version__,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"jax {jax.__version__} on {jax.devices()[0]}; written to {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options))
