"""`python -m experiments.generative` trains and evaluates; see `--help`."""

from __future__ import annotations

from experiments.common.cli import Task, main
from experiments.generative.config import PRESETS, Config
from experiments.generative.evaluate import evaluate
from experiments.generative.export import export
from experiments.generative.train import train

TASK: Task[Config] = Task(
    name="generative",
    description="Train a decoder-only generator whose latent codes come from the joint solve.",
    presets=PRESETS,
    default="digits",
    train=train,
    evaluate=evaluate,
    export=export,
)

if __name__ == "__main__":
    main(TASK)
