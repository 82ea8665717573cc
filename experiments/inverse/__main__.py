"""`python -m experiments.inverse` trains and evaluates; see `--help`."""

from __future__ import annotations

from experiments.common.cli import Task, main
from experiments.inverse.config import PRESETS, Config
from experiments.inverse.evaluate import evaluate
from experiments.inverse.source import adopt
from experiments.inverse.train import train

TASK: Task[Config] = Task(
    name="inverse",
    description="Denoise, inpaint and upsample images by searching the latents of a generator.",
    presets=PRESETS,
    default="digits",
    train=train,
    evaluate=evaluate,
    adopt=adopt,
)

if __name__ == "__main__":
    main(TASK)
