"""How the cost of a joint solve grows with state, latent, iterations and window, each alone.

    python -m experiments.benchmarks.scaling --output scaling.json --figure scaling.png

A dense generator of 28x28 images, untrained, on random images. All solves run all their iterations
and take turns. Beside each measured exponent stands the one that follows from the operations: both
are slopes of the straight line that fits the logarithms best, over the same sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import jdeq
from experiments.benchmarks.timing import Seconds, in_turns, spread, surroundings
from experiments.common.plots import Curve, curves
from experiments.generative.config import PRESETS
from experiments.generative.problem import build_generator

_SHAPE = (28, 28, 1)
_STEP = 0.01  # on x, short enough that nothing diverges


@dataclass(frozen=True)
class Size:
    """What a solve is like.

    Attributes:
        state: Numbers of z.
        latent: Numbers of x.
        iterations: How many, all of which are made.
        window: Of Anderson's method on (z, x, mu); 0 is Adam on x inside the map, without one.
    """

    state: int = 512
    latent: int = 64
    iterations: int = 40
    window: int = 0

    def operations(self) -> float:
        """Multiplications and additions an image.

        An iteration evaluates the cell (W z and U x) and the decoder, and takes the product of each
        with a vector from the left. Anderson's method of type I adds three products of a window
        with a vector, one combination of its vectors, and the solution of a system of its size.
        """
        decoder = PRESETS["mnist"].decoder_hidden
        cell = self.state * (self.state + self.latent)
        output = decoder * (self.state + np.prod(_SHAPE))
        windows = 4 * self.window * (2 * self.state + self.latent) + self.window**3 / 3
        return float(self.iterations * 2 * (2 * (cell + output) + windows))


BASE = Size()
SWEEPS: dict[str, list[Size]] = {
    "state": [replace(BASE, state=n) for n in (128, 256, 512, 1024, 2048)],
    "latent": [replace(BASE, latent=n) for n in (16, 64, 256, 1024)],
    "iterations": [replace(BASE, iterations=n) for n in (10, 20, 40, 80, 160)],
    "window": [replace(BASE, window=n) for n in (5, 10, 20, 40)],
}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: JSON file to write.
        figure: png to draw, if any.
        batch: Images a solve.
        repeats: Rounds; each times every solve once.
        sweeps: Which sizes to vary.
    """

    output: Path
    figure: Path | None = None
    batch: int = 64
    repeats: int = 9
    sweeps: tuple[str, ...] = tuple(SWEEPS)


def main(options: Options) -> None:
    """Time all solves in turns, fit, print and write."""
    chosen = {name: SWEEPS[name] for name in options.sweeps}
    sizes = {size: solve(size, options.batch) for sweep in chosen.values() for size in sweep}
    taken = in_turns({str(size): run for size, run in sizes.items()}, options.repeats, fewest=3)
    rows = {name: summary(name, sweep, taken) for name, sweep in chosen.items()}
    for name, row in rows.items():
        print(
            f"{name:10s} {row['sizes']}: {row['cpu_seconds_median']} s of processor time; "
            f"exponent {row['exponent']:.2f}, of the operations {row['predicted_exponent']:.2f}"
        )
    result = {"batch": options.batch, "repeats": options.repeats, **surroundings("flax", "optax")}
    options.output.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n")
    if options.figure is not None:
        draw(options.figure, rows)


def solve(size: Size, batch: int) -> Callable[[], Any]:
    """The joint solve of a batch, ready to run.

    Raises:
        RuntimeError: Running it, if a solve ended early.
    """
    config = replace(PRESETS["mnist"], hidden=size.state, latent_dim=size.latent)
    generator, params = build_generator(config, _SHAPE, seed=0)
    images = jax.random.uniform(jax.random.key(1), (batch, *_SHAPE))
    x0, z0 = generator.start(params, batch)
    method: Any = jdeq.joint.Descent(step_size=_STEP)
    if size.window:
        solver = jdeq.solvers.Anderson(window=size.window, kind="I")
        method = jdeq.joint.Accelerated(solver, step_size=_STEP)

    def run() -> Any:
        solution = jdeq.joint_solve(
            generator.problem, params, images, x0, z0, method=method,
            rtol=0.0, atol=0.0, max_steps=size.iterations,
        )  # fmt: skip
        if not np.all(np.asarray(solution.steps) == size.iterations):
            raise RuntimeError(
                f"{size}: a solve ended after {np.min(solution.steps)} of {size.iterations} "
                "iterations, so that its time says nothing; use a shorter step."
            )
        return solution.value

    return run


def summary(name: str, sweep: list[Size], taken: Mapping[str, Seconds]) -> dict[str, Any]:
    """One sweep: sizes, times, and the exponents."""
    sizes = [getattr(size, name) for size in sweep]
    spent = [np.median(taken[str(size)].cpu) for size in sweep]
    return {
        "sizes": sizes,
        "cpu_seconds": [spread(taken[str(size)].cpu) for size in sweep],
        "cpu_seconds_median": [float(f"{value:.3g}") for value in spent],
        "seconds": [spread(taken[str(size)].wall) for size in sweep],
        "operations": [size.operations() for size in sweep],
        "exponent": exponent(sizes, spent),
        "predicted_exponent": exponent(sizes, [size.operations() for size in sweep]),
    }


def exponent(sizes: Any, costs: Any) -> float:
    """The slope of log cost over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def draw(path: Path, rows: Mapping[str, dict[str, Any]]) -> None:
    """A panel a sweep: processor time, and the operations in units of its first time."""
    panels, titles = [], []
    for row in rows.values():
        sizes, operations = np.array(row["sizes"]), np.array(row["operations"])
        parts = {
            key: np.array([s[key] for s in row["cpu_seconds"]]) for key in row["cpu_seconds"][0]
        }
        panels.append(
            {
                "processor time": Curve(sizes, parts["median"], parts["min"], parts["max"]),
                "operations, scaled": Curve(sizes, operations / operations[0] * parts["median"][0]),
            }
        )
        titles.append(f"{row['exponent']:.2f}; operations {row['predicted_exponent']:.2f}")
    curves(
        path,
        panels,
        titles=[f"Exponent {title}" for title in titles],
        xlabels=list(rows),
        ylabels=["seconds a solve"] * len(rows),
        log_x=True,
        marker="o",
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
