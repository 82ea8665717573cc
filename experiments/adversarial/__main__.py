"""`python -m experiments.adversarial` trains and evaluates; see `--help`."""

from __future__ import annotations

from experiments.adversarial.config import PRESETS, Config
from experiments.adversarial.evaluate import evaluate
from experiments.adversarial.train import train
from experiments.common.cli import Task, main

TASK: Task[Config] = Task(
    name="adversarial",
    description="Train classifiers on clean images, on PGD's and on joint attacks; attack them.",
    presets=PRESETS,
    default="digits",
    train=train,
    evaluate=evaluate,
)

if __name__ == "__main__":
    main(TASK)
