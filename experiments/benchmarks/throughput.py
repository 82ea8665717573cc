"""Images a second and memory of a training step of the generator, against the batch.

    python -m experiments.benchmarks.throughput --output throughput.json --figure throughput.png

One whole step: joint solve, Jacobian penalty, envelope gradient and AdamW, of an untrained network
on random images. Batches grow by a factor until a step takes too long or no longer fits. Memory is
XLA's own account of the compiled step, of each device: what it holds at once is its temporaries,
its arguments (parameters, optimiser, batch), and those results that do not take the place of
arguments.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.benchmarks.timing import Seconds, seconds, spread, surroundings
from experiments.common.parallel import Devices
from experiments.common.plots import Curve, curves
from experiments.generative.config import PRESETS, Config, StateDtype
from experiments.generative.problem import build_generator
from experiments.generative.train import initial_state, step_of

PyTree = Any

SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "celeba": (64, 64, 3)}
_MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: JSON file to write; rows are added to those that it holds.
        figure: png to draw of them all, if any.
        presets: Presets of the generative task.
        dtypes: Of states and adjoints.
        first: Smallest batch.
        factor: From one batch to the next.
        largest: Largest batch.
        limit: Seconds; no larger batch is tried once a step takes so long, and no second run.
        repeats: Runs after the first, which does not count.
    """

    output: Path
    figure: Path | None = None
    presets: tuple[str, ...] = ("digits", "mnist", "celeba-published")
    dtypes: tuple[StateDtype, ...] = ("float32", "bfloat16")
    first: int = 1
    factor: int = 4
    largest: int = 4096
    limit: float = 60.0
    repeats: int = 7


def main(options: Options) -> None:
    """Measure every batch of every preset and dtype; print and write each at once."""
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for preset in options.presets:
        for dtype in options.dtypes:
            config = replace(PRESETS[preset], state_dtype=dtype)
            batch = options.first
            while batch <= options.largest:
                row = measure(replace(config, batch_size=batch), options.limit, options.repeats)
                if row is None:
                    print(f"{preset}, {dtype}, batch {batch}: does not fit")
                    break
                rows.append({"preset": preset, "state_dtype": dtype, "batch": batch, **row})
                report(rows[-1])
                result = {**surroundings("flax", "optax"), "rows": rows}
                options.output.write_text(json.dumps(result, indent=2) + "\n")
                if row["seconds"]["median"] > options.limit:
                    break
                batch *= options.factor
    if options.figure is not None:
        draw(options.figure, rows)


def measure(config: Config, limit: float, repeats: int) -> dict[str, Any] | None:
    """One batch of one preset; None if the device's memory is too small.

    Args:
        config: Settings.
        limit: Seconds after which the first run is the only one.
        repeats: Runs after the first.
    """
    shape = SHAPES[config.dataset]
    generator, params = build_generator(config, shape, seed=0)
    state = initial_state(config, params, seed=0)
    images = jax.random.uniform(jax.random.key(1), (config.batch_size, *shape))
    devices = Devices(config.batch_size)
    batch = devices.spread({"image": images, "index": jax.numpy.arange(config.batch_size)})
    state, update = devices.place(state), devices.compile(step_of(config, generator))
    compiled: Any = None
    metrics: PyTree = None

    def compile_step() -> None:
        nonlocal compiled
        compiled = update.lower(state, batch).compile()

    def run() -> PyTree:
        nonlocal state, metrics
        state, metrics = compiled(state, batch)
        return metrics

    try:
        compilation = seconds(compile_step)
        samples = [seconds(run)]
        if samples[0].wall <= limit:
            samples = [seconds(run) for _ in range(repeats)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    taken = Seconds(*zip(*samples, strict=True))
    return {
        "iterations": config.inner_steps,
        # Where the median problem is not stationary yet, no solve of the batch ended early.
        "stationarity": float(metrics["kkt_stationarity"]),
        "runs": len(samples),
        "seconds": spread(taken.wall),
        "cpu_seconds": spread(taken.cpu),
        "compile_seconds": compilation._asdict(),
        "bytes": memory(compiled),
        "peak_resident_bytes": peak_resident(),
    }


def memory(compiled: Any) -> dict[str, int]:
    """XLA's account of a compiled program, in bytes."""
    account = compiled.memory_analysis()
    parts = {
        "temporary": account.temp_size_in_bytes,
        "arguments": account.argument_size_in_bytes,
        "results": account.output_size_in_bytes - account.alias_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def peak_resident() -> int:
    """The most memory that this process has held so far, compilation included, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def report(row: dict[str, Any]) -> None:
    """Print a row."""
    batch, taken, spent = row["batch"], row["seconds"]["median"], row["cpu_seconds"]["median"]
    print(
        f"{row['preset']}, {row['state_dtype']}, batch {batch}: {batch / taken:.3g} images/s, "
        f"{batch / spent:.3g} a second of processor time ({row['runs']} runs, compiled in "
        f"{row['compile_seconds']['wall']:.0f} s); {row['bytes']['total'] / _MIB:.1f} MiB, "
        f"process at most {row['peak_resident_bytes'] / _MIB:.0f} MiB",
        flush=True,
    )


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Images a second of processor time, and memory, against the batch."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        series.setdefault(f"{row['preset']}, {row['state_dtype']}", []).append(row)
    speed, space = {}, {}
    for label, points in series.items():
        batches = np.array([row["batch"] for row in points])
        spent = {
            key: np.array([row["cpu_seconds"][key] for row in points])
            for key in ("median", "min", "max")
        }
        speed[label] = Curve(
            batches, batches / spent["median"], batches / spent["max"], batches / spent["min"]
        )
        space[label] = Curve(batches, np.array([row["bytes"]["total"] for row in points]) / _MIB)
    curves(
        path,
        [speed, space],
        titles=["Training step: speed", "Training step: memory"],
        xlabels=["batch"] * 2,
        ylabels=["images a second of processor time", "MiB, by XLA's account"],
        log_x=True,
        marker="o",
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
