"""`python -m experiments.meta` trains and evaluates; see `--help`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.common.cli import Arguments, Task, main
from experiments.common.errors import UserError
from experiments.meta.config import PRESETS, Config
from experiments.meta.evaluate import evaluate
from experiments.meta.train import train


@dataclass(frozen=True)
class MetaArguments(Arguments):
    """Arguments of this task.

    Attributes:
        ways: Classes of a test task; with this option or `--shots`, only such tasks are tested.
        shots: Support examples a class of a test task.
        tasks: Test tasks.
        queries: Query examples a class of a test task.
    """

    ways: int | None = None
    shots: int | None = None
    tasks: int | None = None
    queries: int | None = None


def adjusted(config: Config, arguments: MetaArguments) -> Config:
    """The settings with the test tasks that the command line asks for.

    Raises:
        UserError: An option is below 1.
    """
    for name in ("ways", "shots", "tasks", "queries"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} leaves nothing to test; give at least 1.")
    if arguments.ways is not None or arguments.shots is not None:
        ways, shots = config.settings[0]
        config = replace(config, settings=((arguments.ways or ways, arguments.shots or shots),))
    if arguments.tasks is not None:
        config = replace(config, test_tasks=arguments.tasks)
    if arguments.queries is not None:
        config = replace(config, test_queries=arguments.queries)
    return config


TASK: Task[Config] = Task(
    name="meta",
    description="Learn from few examples, with fast parameters from the joint solve.",
    presets=PRESETS,
    default="sinusoid",
    train=train,
    evaluate=evaluate,
    arguments=MetaArguments,
    adjust=adjusted,
)

if __name__ == "__main__":
    main(TASK)
