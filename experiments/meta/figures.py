"""Figures of a run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import plots
from experiments.common.runs import RunDirectory, read_metrics
from experiments.common.speed import Comparison
from experiments.common.speed_figure import objective_over_time
from experiments.meta.accuracy import learner_outputs
from experiments.meta.problem import Learner
from experiments.meta.tasks import TaskSource

PyTree = Any

_FITS = 3
_POINTS = 400
_SHOWN_WAYS = 5
_SHOWN_QUERIES = 4
_LEARNERS = {
    "joint": "joint",
    "proto": "prototypes",
    "maml": "MAML",
    "fomaml": "MAML, first order",
    "imaml": "implicit MAML",
}


def draw(
    run: RunDirectory, learner: Learner, params: PyTree, source: TaskSource, speed: Comparison
) -> None:
    """Write all figures."""
    _training(run)
    objective_over_time(run.figures / "objective.png", speed, "Support objective", "test tasks")
    if learner.regression:
        _fits(run, learner, params, source)
    elif len(source.shape) == 3:
        _task(run, learner, params, source)


def _training(run: RunDirectory) -> None:
    """The loss on queries, or the error rate, over training."""
    kinds = {"joint": run.path}
    kinds |= {kind: run.path / kind for kind, _ in run.record.settings["baselines"]}
    curves = {}
    for kind, path in kinds.items():
        rows = read_metrics(path)
        if rows:
            wrong = [1 - row["accuracy"] if "accuracy" in row else row["loss"] for row in rows]
            steps = np.array([row["step"] for row in rows])
            curves[_LEARNERS[kind]] = plots.Curve(steps, _smoothed(np.array(wrong)))
    named = "accuracy" in read_metrics(run.path)[-1]
    plots.curves(
        run.figures / "training.png",
        [curves],
        titles=["Queries of training tasks (running mean)"],
        xlabels=["training step"],
        ylabels=["share of wrong answers" if named else "squared error"],
    )


def _smoothed(values: np.ndarray, width: int = 10) -> np.ndarray:
    """The mean of the last `width` values at each place."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    last = np.arange(1, len(sums))
    first = np.maximum(last - width, 0)
    return (sums[last] - sums[first]) / (last - first)


def _fits(run: RunDirectory, learner: Learner, params: PyTree, source: TaskSource) -> None:
    """Fitted sinusoids beside their supports."""
    shots = learner.config.settings[-1][1]
    tasks = source.testing(1, shots, _POINTS, run.record.seed).first(_FITS)
    order = np.argsort(tasks.query[..., 0], axis=1)[..., None]
    made = jax.jit(learner_outputs(learner))(
        params, *(jnp.asarray(part) for part in (tasks.support, tasks.support_label, tasks.query))
    )
    inputs, truth, fitted = (
        np.take_along_axis(np.asarray(part), order, axis=1)[..., 0]
        for part in (tasks.query, tasks.query_label, made)
    )
    plots.fits(
        run.figures / "fits.png",
        inputs,
        {"sinusoid": truth, "fitted": fitted},
        (tasks.support[..., 0], tasks.support_label[..., 0]),
        f"Test tasks of {shots} examples",
    )


def _task(run: RunDirectory, learner: Learner, params: PyTree, source: TaskSource) -> None:
    """Support, and queries; those that are taken for another class say for which."""
    assert source.test is not None
    ways = min(_SHOWN_WAYS, len(source.test))
    shown = min(_SHOWN_QUERIES, min(len(images) for images in source.test.images) - 1)
    tasks = source.testing(ways, 1, shown, run.record.seed).first(1)
    target = learner.target(jnp.asarray(tasks.support_label), ways)
    made = jax.jit(learner_outputs(learner))(params, tasks.support, target, tasks.query)
    answers = np.asarray(made)[0].argmax(-1).reshape(ways, shown)
    queries = tasks.query[0].reshape(ways, shown, *source.shape)
    names = [chr(ord("A") + way) for way in range(ways)]
    rows = [plots.Row("support", 1 - tasks.support[0], [f"class {name}" for name in names])]
    for number, guesses in enumerate(answers.T):
        wrong = guesses != np.arange(ways)
        notes = [f"taken for {names[g]}" if w else "" for g, w in zip(guesses, wrong, strict=True)]
        rows.append(plots.Row(f"query {number + 1}", 1 - queries[:, number], notes, wrong))
    right = np.mean(answers == np.arange(ways)[:, None])
    plots.annotated_rows(
        run.figures / "task.png", rows, f"A test task: {right:.0%} of its queries are right"
    )
