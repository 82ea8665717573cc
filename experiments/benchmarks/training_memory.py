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

_MULTISCALE = replace(
    PRESETS["faces"],
    generator="multiscale",
    channels=(8, 16, 32),
    batch_size=16,
    jacobian_weight=500.0,
)
CASES = {
    "digits": (PRESETS["digits"], (8, 8, 1)),
    "mnist": (PRESETS["mnist"], (28, 28, 1)),
    "multiscale": (_MULTISCALE, (48, 40, 1)),
}
"""Settings and shape of the images of each case."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: JSON file to write.
        cases: Presets of the generative task, and its convolutional generator at a CPU's size.
    """

    output: Path
    cases: tuple[str, ...] = tuple(CASES)


def main(options: Options) -> None:
    """Print and write the temporary memory of each case's step, in bytes."""
    rows = {case: [temporary(case, steps) for steps in (20, 200)] for case in options.cases}
    for case, (short, long) in rows.items():
        print(f"{case:10s} {short:12,} bytes at 20 iterations, {long:12,} at 200")
    result = {"jax": jax.__version__, "jdeq": jdeq.__version__, "device": str(jax.devices()[0])}
    options.output.write_text(json.dumps({**result, "bytes": rows}, indent=2) + "\n")


def temporary(case: str, inner_steps: int) -> int:
    """Bytes that the compiled gradient needs besides its arguments and results."""
    settings, shape = CASES[case]
    config = replace(settings, inner_steps=inner_steps)
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
