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

from experiments.common.parallel import Devices, make_mesh, use_mesh
from tests.experiments.common.hlo import collectives, loops
from tests.experiments.common.small_tasks import BATCH, HIDDEN, TASKS, Training

STEPS = 3


def train(task: str) -> tuple[object, dict, str]:
    """The parameters after a few steps, the last metrics, and the compiled program."""
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


def difference(one: object, other: object) -> float:
    """Norm of the difference over the norm."""
    ours, theirs = (
        np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])
        for tree in (one, other)
    )
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def main(tasks: str, model_devices: str = "1") -> None:
    """Print what was found."""
    found: dict[str, Any] = {"control": control()}
    count = len(jax.devices())
    for task in tasks.split(","):
        with use_mesh(make_mesh(devices=jax.devices()[:1])):
            alone, metrics_alone, _ = train(task)
        with use_mesh(make_mesh(int(model_devices))):
            state, metrics, text = train(task)
        inside = "\n".join(loops(text))
        leaves = jax.tree.leaves(state.params)
        part = BATCH // (count // int(model_devices))
        found[task] = {
            "params": difference(state.params, alone.params),
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
