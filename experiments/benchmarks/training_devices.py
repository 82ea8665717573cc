"""What training gains from several devices: one step on one of them and on all, in turns.

    python -m experiments.benchmarks.training_devices --output devices.json

Whole steps of untrained models on random images, the batch spread as in training. On a CPU each
core is a device (`experiments.common.devices.use_all_cores`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.adversarial import train as adversarial
from experiments.adversarial.config import PRESETS as ADVERSARIAL
from experiments.adversarial.problem import build_network
from experiments.benchmarks.throughput import SHAPES
from experiments.benchmarks.timing import in_turns, spread, surroundings
from experiments.common.devices import use_all_cores
from experiments.common.parallel import Devices, make_mesh, use_mesh
from experiments.common.step import TrainState, Update
from experiments.generative import train as generative
from experiments.generative.config import PRESETS as GENERATIVE
from experiments.generative.problem import build_generator

PyTree = Any

WORKLOADS = {
    "generative digits": ("generative", "digits", "joint"),
    "generative mnist": ("generative", "mnist", "joint"),
    "adversarial mnist-small, joint attack": ("adversarial", "mnist-small", "joint"),
    "adversarial mnist-small, PGD": ("adversarial", "mnist-small", "pgd"),
}
"""Task, preset and model of each row."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: JSON file to write.
        repeats: Rounds; each makes one step on one device and one on all.
    """

    output: Path
    repeats: int = 15


def main(options: Options) -> None:
    """Measure every workload; print and write the result."""
    use_all_cores()
    rows = {}
    for name, workload in WORKLOADS.items():
        rows[name] = measure(*workload, options.repeats)
        print(f"{name}: one device / all {rows[name]['one_over_all']}", flush=True)
    result = {**surroundings("flax", "optax"), "devices": len(jax.devices()), "rows": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


def measure(task: str, preset: str, model: str, repeats: int) -> dict[str, Any]:
    """Seconds of a step on one device and on all, and their ratio round by round."""
    runs = {}
    for name, devices in {"one": jax.devices()[:1], "all": jax.devices()}.items():
        with use_mesh(make_mesh(devices=devices)):
            runs[name] = stepper(task, preset, model)
    samples = in_turns(runs, repeats)
    one, every = samples["one"], samples["all"]
    return {
        "one_over_all": spread(np.array(one.wall) / np.array(every.wall), 3),
        "one": {"seconds": spread(one.wall), "cpu_seconds": spread(one.cpu)},
        "all": {"seconds": spread(every.wall), "cpu_seconds": spread(every.cpu)},
    }


def stepper(task: str, preset: str, model: str) -> Callable[[], PyTree]:
    """A function that makes one step on the devices of the current mesh."""
    if task == "generative":
        update, state, batch = _generative(preset)
    else:
        update, state, batch = _adversarial(preset, model)
    devices = Devices(len(batch["image"]))
    state, batch = devices.place(state), devices.spread(batch)
    return partial(jax.jit(update).lower(state, batch).compile(), state, batch)


def _generative(preset: str) -> tuple[Update, TrainState, dict[str, np.ndarray]]:
    config = GENERATIVE[preset]
    shape = SHAPES[config.dataset]
    generator, params = build_generator(config, shape, seed=0)
    state = generative.initial_state(config, params, seed=0)
    return generative.step_of(config, generator), state, _images(config.batch_size, shape)


def _adversarial(preset: str, model: str) -> tuple[Update, TrainState, dict[str, np.ndarray]]:
    config = ADVERSARIAL[preset]
    shape = SHAPES[config.dataset]
    network, params = build_network(config.sizes(shape), 0)
    state = adversarial.initial_state(config, params, 0)
    # Past the ramp, at the full radius.
    state = state._replace(step=jnp.asarray(config.steps, jnp.int32))
    return adversarial.step_of(config, network, model), state, _images(config.batch_size, shape)


def _images(count: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "image": random.random((count, *shape), np.float32),
        "label": random.integers(0, 10, count).astype(np.int32),
        "index": np.arange(count, dtype=np.int32),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
