"""What bfloat16 states cost in accuracy: KKT residuals and PSNR of a trained generator.

    python -m experiments.benchmarks.mixed_precision --run-dir RUN --output precision.json

The same parameters and test images, with float32 and with bfloat16 states and adjoints. Two solves:
the one of training, so many iterations of Adam in the map, and the default one of the evaluation,
at several tolerances. Residuals are given twice: as the solve itself reports them, whose map rounds
its results to the state's dtype, and measured at the returned point in float32 throughout.

With `--training-steps` both are also trained anew, for so many steps on the same batches, and
judged by the same float32 solve.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jdeq
from experiments.benchmarks.problems import row_norms
from experiments.benchmarks.timing import spread, surroundings
from experiments.common.data import ImageData, batches, load_images
from experiments.common.metrics import psnr
from experiments.common.parallel import Devices
from experiments.common.runs import open_run
from experiments.generative.config import Config, StateDtype
from experiments.generative.evaluate import load_generator
from experiments.generative.problem import (
    Generator,
    build_generator,
    mean_image,
    squared_error,
    training_method,
)
from experiments.generative.train import initial_state, step_of

PyTree = Any

DTYPES: tuple[StateDtype, ...] = ("float32", "bfloat16")
_JUDGE = {"rtol": 1e-2, "max_steps": 300}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        run_dir: A run of the generative task.
        output: JSON file to write.
        data_root: Folder of the data sets; see `experiments.common.cli`.
        images: Test images, at most.
        rtols: Tolerances of the default solve.
        patience: Iterations without a lower objective after which one of its problems stops.
        training_steps: Of a training with each dtype; 0 for none.
    """

    run_dir: Path
    output: Path
    data_root: Path | None = None
    images: int = 360
    rtols: tuple[float, ...] = (3e-2, 1e-2, 1e-3)
    patience: int = 40
    training_steps: int = 0


def main(options: Options) -> None:
    """Measure all solves with both dtypes, print and write the result."""
    run = open_run(options.run_dir, "generative")
    config = run.record.settings_as(Config)
    data = load_images(config.dataset, options.data_root, config.image_size)
    _, restored = load_generator(config, run, data.shape)
    params, targets = restored.state.params, jnp.asarray(data.test.first(options.images))
    generators = {
        dtype: build_generator(replace(config, state_dtype=dtype), data.shape, seed=0)[0]
        for dtype in DTYPES
    }
    solves: dict[str, dict[str, Any]] = {
        f"training, {config.inner_steps} iterations": {
            "method": training_method(config),
            "max_steps": config.inner_steps,
        }
    }
    for rtol in options.rtols:
        solves[f"default, rtol {rtol:g}"] = {
            "rtol": rtol,
            "max_steps": config.evaluation_steps,
            "patience": options.patience,
        }
    rows: dict[str, dict[str, Any]] = {
        name: {
            dtype: measure(generator, generators["float32"], params, targets, solve)
            for dtype, generator in generators.items()
        }
        for name, solve in solves.items()
    }
    report(rows)
    trained: dict[str, Any] = {}
    if options.training_steps:
        schedule = replace(config, steps=options.training_steps)
        for dtype in DTYPES:
            params = train(replace(schedule, state_dtype=dtype), data, run.record.seed)
            trained[dtype] = measure(
                generators["float32"], generators["float32"], params, targets, _JUDGE
            )
        report({f"trained for {options.training_steps} steps, solved in float32": trained})
    result = {
        "run": {"preset": run.record.preset, "seed": run.record.seed, "step": restored.step},
        "images": len(targets),
        **surroundings("flax", "optax"),
        "rows": rows,
        "trained": {"steps": options.training_steps, **trained},
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def train(config: Config, data: ImageData, seed: int) -> PyTree:
    """The parameters after a training as the task does it."""
    generator, params = build_generator(config, data.shape, seed, mean_image(data))
    devices = Devices(config.batch_size)
    update = devices.compile(step_of(config, generator))
    state = devices.place(initial_state(config, params, seed))
    order = batches(data.train, config.batch_size, seed)
    for _ in range(config.steps):
        state, _ = update(state, devices.spread(next(order)))
    return jax.device_get(state.params)


def measure(
    generator: Generator,
    exact: Generator,
    params: PyTree,
    targets: jax.Array,
    solve: dict[str, Any],
) -> dict[str, Any]:
    """One solve of all targets.

    Args:
        generator: The network that solves.
        exact: The same with float32 states.
        params: Parameters of both.
        targets: [B, H, W, C] in [0, 1].
        solve: Keywords of `jdeq.joint_solve`.
    """
    x0, z0 = generator.start(params, len(targets))
    solution = jdeq.joint_solve(generator.problem, params, targets, x0, z0, **solve)
    measured = exact_residual(exact, params, targets, solution.value)
    pixels = targets[0].size
    errors = {
        "psnr": squared_error(generator.images(params, solution.value.x), targets),
        "psnr_in_float32": squared_error(exact.images(params, solution.value.x), targets),
    }
    codes = np.asarray(solution.result)
    return {
        **{name: psnr(float(jnp.mean(error)) / pixels) for name, error in errors.items()},
        "residual": relative(solution.residual, solution.value),
        "residual_in_float32": relative(measured, solution.value),
        "iterations": spread(solution.steps),
        "results": {code.name: int(np.sum(codes == code)) for code in jdeq.Result},
    }


def exact_residual(
    exact: Generator, params: PyTree, targets: jax.Array, at: jdeq.AugmentedState
) -> jdeq.KKTResidual:
    """The KKT residuals at a point, in float32, with the objective's scale of a solve from zero."""
    z, x, mu = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), at)
    here = jdeq.joint_solve(exact.problem, params, targets, x, z, mu0=mu, max_steps=1)
    # One step returns the point that it is given. Its own start is the scale of its stationarity.
    x0, z0 = exact.start(params, len(targets))
    first, last = exact.problem.objective(params, z0, x0, targets), here.aux.objective
    stationarity = here.residual.stationarity * 2 * last / (first + last)
    return here.residual._replace(stationarity=stationarity)


def relative(residual: jdeq.KKTResidual, at: jdeq.AugmentedState) -> dict[str, dict[str, float]]:
    """Medians over problems, and extremes; state and adjoint in units of their norms."""
    return {
        "state": spread(np.asarray(residual.state) / row_norms(at.z), 3),
        "adjoint": spread(np.asarray(residual.adjoint) / row_norms(at.mu), 3),
        "stationarity": spread(residual.stationarity, 3),
    }


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Print the medians."""
    for name, by_dtype in rows.items():
        print(name)
        for dtype, row in by_dtype.items():
            own, exact = (
                ", ".join(f"{part['median']:.1e}" for part in row[key].values())
                for key in ("residual", "residual_in_float32")
            )
            ends = ", ".join(f"{n} {code}" for code, n in row["results"].items() if n)
            print(
                f"  {dtype:9s} {row['psnr']:.3f} dB; KKT {own} (in float32 {exact}); "
                f"{row['iterations']['median']:g} iterations; {ends}"
            )


if __name__ == "__main__":
    main(tyro.cli(Options))
