"""Whether the memory of a training step grows with the number of its inner iterations.

    python -m experiments.benchmarks.training_memory --output memory.json

XLA's own account of the compiled gradient of the training loss, at 20 and at 200 iterations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

import jdeq
from experiments.generative.config import PRESETS
from experiments.generative.problem import build_generator
from experiments.generative.train import training_loss

_SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "faces": (48, 40, 1)}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: JSON file to write.
        presets: Presets of the generative task.
    """

    output: Path
    presets: tuple[str, ...] = tuple(_SHAPES)


def main(options: Options) -> None:
    """Print and write the temporary memory of each preset's step, in bytes."""
    rows = {preset: [temporary(preset, steps) for steps in (20, 200)] for preset in options.presets}
    for preset, (short, long) in rows.items():
        print(f"{preset:8s} {short:12,} bytes at 20 iterations, {long:12,} at 200")
    result = {"jax": jax.__version__, "jdeq": jdeq.__version__, "device": str(jax.devices()[0])}
    options.output.write_text(json.dumps({**result, "bytes": rows}, indent=2) + "\n")


def temporary(preset: str, inner_steps: int) -> int:
    """Bytes that the compiled gradient needs besides its arguments and results."""
    config = replace(PRESETS[preset], inner_steps=inner_steps)
    shape = _SHAPES[preset]
    generator, params = build_generator(config, shape, seed=0)

    def gradient(params, images, keys):
        x0, _ = generator.start(params, len(images))
        loss = jax.grad(training_loss, has_aux=True)
        gradient, measured = loss(params, generator, config, images, keys, x0)
        return gradient, measured.means, measured.medians

    images = jnp.zeros((config.batch_size, *shape))
    keys = jax.random.split(jax.random.key(0), len(images))
    compiled = jax.jit(gradient).lower(params, images, keys).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend gives no account of its memory"
    return analysis.temp_size_in_bytes


if __name__ == "__main__":
    main(tyro.cli(Options))
