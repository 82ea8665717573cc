"""Trains on one of the devices of this process and on all: `python -m tests...many_devices`.

    ... TASK,TASK,... [MODEL_DEVICES]

Prints, as JSON, what was found of each task.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.parallel import Devices, make_mesh, use_mesh
from experiments.common.step import TrainState
from tests.experiments.common.hlo import collectives, loops
from tests.experiments.common.small_tasks import BATCH, HIDDEN, TASKS, Training

STEPS = 3
_ROUNDING = 1e-5  # of a gradient's entries, relative to the largest


def train(task: str) -> tuple[TrainState, dict, str]:
    """The state after a few steps, the last metrics, and the compiled program."""
    training: Training = TASKS[task]()
    devices = Devices(BATCH)
    update = devices.compile(training.update)
    state, text = devices.place(training.state), ""
    for _ in range(STEPS):
        batch = devices.spread(next(training.batches))
        if not text:
            compiled = update.lower(state, batch).compile()
            text = compiled.as_text()
        state, metrics = compiled(state, batch)
    return state, metrics, text


def control() -> list[str]:
    """The communication in a loop that XLA partitions by itself."""
    numbers = Devices(BATCH).spread(np.ones(BATCH, np.float32))
    loop = jax.jit(lambda x: jax.lax.while_loop(lambda x: jnp.any(x < 9), lambda x: x + 1, x))
    return collectives("\n".join(loops(loop.lower(numbers).compile().as_text())))


def compare(one: TrainState, other: TrainState) -> tuple[float, float]:
    """Norm of the difference of the parameters over their norm, and the share that is left out.

    Adam moves an entry whose gradient is zero but for rounding, as symmetries make it, by a whole
    step at random: such entries say nothing.
    """
    ours, theirs, squares = (
        np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])
        for tree in (one.params, other.params, optax.tree.get(other.optimizer, "nu"))
    )
    kept = (squares == 0) | (squares > _ROUNDING**2 * squares.max())
    error = np.linalg.norm((ours - theirs)[kept]) / np.linalg.norm(theirs)
    return float(error), float(1 - kept.mean())


def main(tasks: str, model_devices: str = "1") -> None:
    """Print what was found."""
    found: dict[str, Any] = {"control": control()}
    count = len(jax.devices())
    for task in tasks.split(","):
        with use_mesh(make_mesh(devices=jax.devices()[:1])):
            alone, metrics_alone, _ = train(task)
        with use_mesh(make_mesh(int(model_devices))):
            state, metrics, text = train(task)
        error, left_out = compare(state, alone)
        inside = "\n".join(loops(text))
        leaves = jax.tree.leaves(state.params)
        part = BATCH // (count // int(model_devices))
        found[task] = {
            "params": error,
            "left_out": left_out,
            "metrics": {
                name: float(abs(metrics[name] - value) / max(abs(value), 1e-6))
                for name, value in metrics_alone.items()
            },
            "devices": min(len(leaf.sharding.device_set) for leaf in leaves),
            "smallest_share": min(
                leaf.addressable_shards[0].data.size / leaf.size for leaf in leaves
            ),
            "loops": len(loops(text)),
            "collectives": sorted(set(collectives(text))),
            "collectives_in_loops": sorted(set(collectives(inside))),
            "whole_states_in_loops": inside.count(f"f32[{BATCH},{HIDDEN}]"),
            "parts_in_loops": inside.count(f"f32[{part},{HIDDEN}]"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
