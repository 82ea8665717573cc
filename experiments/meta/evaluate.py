"""Evaluation of a run, from its directory and the data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.checkpoints import Restored, restore_newest
from experiments.common.cli import Summary
from experiments.common.data import data_root as located
from experiments.common.data.omniglot import holds_characters, load_one_shot_runs
from experiments.common.data.tasks import Tasks
from experiments.common.devices import device_name
from experiments.common.errors import UserError
from experiments.common.runs import RunDirectory
from experiments.common.step import TrainState
from experiments.common.terminal import say
from experiments.meta import figures
from experiments.meta.accuracy import Outputs, learner_outputs, mean_and_interval, scores
from experiments.meta.baselines import build_baseline
from experiments.meta.baselines.prototypical import nearest_neighbour
from experiments.meta.config import Config
from experiments.meta.gradient_error import gradient_error
from experiments.meta.problem import Learner, build_learner
from experiments.meta.speed import measure_solves, seconds_of_steps
from experiments.meta.tasks import TaskSource, load_tasks
from experiments.meta.train import initial_state, outer_optimizer

PyTree = Any

_GRADIENT_TASKS = 2
_GRADIENT_QUERIES = 3


def evaluate(config: Config, run: RunDirectory, data_root: Path | None) -> Summary:
    """Test on tasks of unseen classes, check the outer gradient, and measure speed.

    Lake's one-shot runs are tested on too, where the data holds them, and alone where it holds
    nothing else.

    Returns:
        The results; figures are written to the run directory.

    Raises:
        UserError: There is no checkpoint yet, or the examples are not of the shape trained on.
    """
    place = located(data_root)
    runs = load_one_shot_runs(place) if config.dataset == "omniglot" else []
    if runs and not holds_characters(place):
        say(f"{place} holds one-shot runs and no characters: nothing else is tested.")
        learner, restored = load_learner(config, run, runs[0].support.shape[2:])
        return _one_shot_runs(learner, restored.state.params, runs) | _trained(restored)
    source = load_tasks(config, data_root)
    learner, restored = load_learner(config, run, source.shape)
    params = restored.state.params
    methods: dict[str, tuple[Outputs, PyTree]] = {"": (learner_outputs(learner), params)}
    methods |= {f"{kind}_": found for kind, found in _baselines(config, run, source.shape).items()}
    if not learner.regression:
        methods["pixels_"] = (lambda _, *task: nearest_neighbour(*task), None)

    summary = _accuracies(config, run.record.seed, source, learner, methods)
    if runs:
        summary |= _one_shot_runs(learner, params, runs)
    ways, shots = config.settings[0]
    seed = run.record.seed
    say("checking the outer gradient")
    queries = min(_GRADIENT_QUERIES, config.test_queries)  # there may be no more images
    few = source.testing(ways, shots, queries, seed).first(_GRADIENT_TASKS)
    error = gradient_error(learner, params, few, ways, seed)
    say("measuring speed")
    sampler = source.testing(ways, shots, config.test_queries, seed)
    speed = measure_solves(learner, params, sampler.first(config.speed_tasks), ways)
    steps = _seconds_of_steps(config, source, learner, params, seed)
    figures.draw(run, learner, params, source, speed)
    return {
        **summary,
        "gradient_error_kkt": error.single,
        "gradient_error_kkt_float64": error.double,
        **speed.summary(),
        **steps,
        "test_tasks": config.test_tasks,
        **_trained(restored),
    }


def _trained(restored: Restored) -> Summary:
    """What was trained, how long, and where it is evaluated."""
    return {
        "seconds_train": restored.notes["seconds"],
        "step": restored.step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(restored.state.params)),
        "device": device_name(),
    }


def load_learner(
    config: Config, run: RunDirectory, shape: tuple[int, ...]
) -> tuple[Learner, Restored]:
    """The learner and the newest undamaged checkpoint of a run.

    Raises:
        UserError: There is no checkpoint, or the examples are not of the shape trained on.
    """
    learner, params = build_learner(config, shape, config.ways, run.record.seed)
    template = jax.eval_shape(lambda: initial_state(config, params, run.record.seed))
    restored = restore_newest(run.checkpoints, template, discard=False)
    if restored is None:
        raise UserError(
            f"{run.path} has no checkpoint yet; train first with `python -m experiments.meta train "
            f"--run-dir {run.path} --resume`."
        )
    if restored.step < config.steps:
        say(f"the run is unfinished: evaluating step {restored.step} of {config.steps}.")
    return learner, restored


def _baselines(
    config: Config, run: RunDirectory, shape: tuple[int, ...]
) -> dict[str, tuple[Outputs, PyTree]]:
    """The baselines that have a checkpoint."""
    found: dict[str, tuple[Outputs, PyTree]] = {}
    for kind, steps in config.baselines:
        model, params = build_baseline(kind, config, shape, run.record.seed)
        optimizer = outer_optimizer(config, steps)
        template = TrainState.start(params, optimizer, run.record.seed)
        restored = restore_newest(run.part(kind).checkpoints, template, discard=False)
        if restored is None:
            say(f"{kind} is not trained yet: it is left out.")
        else:
            found[kind] = (model.outputs, restored.state.params)
    return found


def _accuracies(
    config: Config,
    seed: int,
    source: TaskSource,
    learner: Learner,
    methods: dict[str, tuple[Outputs, PyTree]],
) -> Summary:
    """Means and confidence intervals of all methods on the same tasks."""
    summary: Summary = {}
    samplers = {
        setting: source.testing(*setting, config.test_queries, seed) for setting in config.settings
    }
    for (ways, shots), sampler in samplers.items():
        name = f"squared_error_{shots}s" if learner.regression else f"accuracy_{ways}w{shots}s"
        for prefix, (outputs, params) in methods.items():
            values = scores(outputs, params, sampler, ways, config.test_tasks, learner.regression)
            mean, interval = mean_and_interval(values)
            say(f"{prefix}{name} {mean:.4f} +- {interval:.4f}")
            summary[f"{prefix}{name}"], summary[f"{prefix}{name}_ci95"] = mean, interval
    return summary


def _one_shot_runs(learner: Learner, params: PyTree, runs: list[Tasks]) -> Summary:
    """Accuracy on Lake's one-shot runs."""
    outputs = jax.jit(learner_outputs(learner))
    right = []
    for tasks in runs:
        ways = int(tasks.support_label.max()) + 1
        target = learner.target(jax.numpy.asarray(tasks.support_label), ways)
        made = np.asarray(outputs(params, tasks.support, target, tasks.query))
        right.append(float(np.mean(made.argmax(-1) == tasks.query_label)))
    mean, interval = mean_and_interval(np.asarray(right))
    return {
        "accuracy_one_shot_runs": mean,
        "accuracy_one_shot_runs_ci95": interval,
        "one_shot_runs": len(runs),
    }


def _seconds_of_steps(
    config: Config, source: TaskSource, learner: Learner, params: PyTree, seed: int
) -> Summary:
    """Time of the outer gradient on test tasks as large as those of training, if there are any."""
    try:
        sampler = source.testing(config.ways, config.shots, config.queries, seed)
    except UserError as error:
        say(f"no time of training steps, whose tasks are larger than this data allows: {error}")
        return {}
    seconds = seconds_of_steps(learner, params, sampler.first(config.tasks))
    return {f"seconds_step_{inner}": spent for inner, spent in seconds.items()}
