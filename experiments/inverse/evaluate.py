"""Evaluation of a run, from its directory and the data alone: every problem by every method."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.checkpoints import Restored as Checkpoint
from experiments.common.checkpoints import restore_newest
from experiments.common.cli import Summary
from experiments.common.devices import device_name
from experiments.common.errors import UserError
from experiments.common.metrics import psnr
from experiments.common.runs import RunDirectory
from experiments.common.step import TrainState
from experiments.common.terminal import say
from experiments.inverse import figures
from experiments.inverse.classical import best_weight, restore_classically
from experiments.inverse.config import Config
from experiments.inverse.measurements import KINDS
from experiments.inverse.prior import Prior
from experiments.inverse.problem import Parameters
from experiments.inverse.solvers import Batch, Method, Restored, Solver
from experiments.inverse.source import Source, load_source
from experiments.inverse.train import initial_state
from experiments.inverse.tuning import (
    Belief,
    Choice,
    batch_of,
    choose_beliefs,
    choose_rates,
    shortest,
    split_images,
)


class Study(NamedTuple):
    """What all problems are evaluated with.

    Attributes:
        config: Settings.
        source: The models without a task.
        state: The models trained for their tasks.
        solver: Runs the solves.
        vae_beliefs: What suits the autoencoder's decoder.
    """

    config: Config
    source: Source
    state: TrainState
    solver: Solver
    vae_beliefs: dict[str, Belief]


class Outcome(NamedTuple):
    """One problem's results.

    Attributes:
        batch: The problems.
        restored: By the name of the method.
        curves: For joint and nested, (seconds, PSNR) of each length on the test images.
    """

    batch: Batch
    restored: dict[str, Restored]
    curves: dict[str, list[tuple[float, float]]]


def evaluate(config: Config, run: RunDirectory, data_root: Path | None) -> Summary:
    """Restore the test images of every problem by every method.

    Returns:
        The results; figures are written to the run directory.

    Raises:
        UserError: There is no checkpoint yet, or the images are not of the size trained on.
    """
    source = load_source(config, run, data_root)
    checkpoint = _restore(config, run, source)
    if checkpoint.step < config.steps:
        say(f"the run is unfinished: evaluating step {checkpoint.step} of {config.steps}.")
    say("choosing the autoencoder's priors and their weights")
    solver = Solver(source.generator)
    vae_beliefs = choose_beliefs(source, source.vae, source.vae_priors(config), config, solver)
    study = Study(config, source, checkpoint.state, solver, vae_beliefs)
    images = split_images(source, config)
    summary: Summary = {}
    outcomes = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        say(kind.label)
        outcome, results = _evaluate(study, number, name, images.test, images.validation)
        figures.restorations(run.figures / f"{name}.png", kind, outcome.batch, outcome.restored)
        summary |= results
        outcomes[name] = outcome.curves
    figures.psnr_over_time(run.figures, outcomes, len(images.test))
    return {
        **summary,
        "seconds_train": checkpoint.notes["seconds"],
        "step": checkpoint.step,
        "test_images": len(images.test),
        "validation_images": len(images.validation),
        "device": device_name(),
    }


def _evaluate(
    study: Study, number: int, name: str, test: np.ndarray, validation: np.ndarray
) -> tuple[Outcome, Summary]:
    """One problem by every method, each as tuned on the validation images."""
    config, source, state, solver = study.config, study.source, study.state, study.solver
    kind = KINDS[name]
    tuning, batch = batch_of(name, validation), batch_of(name, test)
    params, (prior, penalty) = jax.tree.map(lambda leaf: leaf[number], (state.params, state.memory))
    trained, plain = Parameters(params, prior), Parameters(source.joint, prior)

    joint = [Method("joint", steps) for steps in config.joint_steps]
    nested = [Method("nested", steps) for steps in config.nested_steps]
    choices = choose_rates(solver, trained, penalty, tuning, [*joint, *nested], config.rates)
    timed = {
        method: solver.restore(method, choice.rate, trained, penalty, batch, timed=True)
        for method, choice in choices.items()
    }
    chosen = shortest({method: choices[method] for method in joint})
    restored = {"joint": timed[chosen.method]}
    restored["nested"] = timed[_within(choices, timed, nested, restored["joint"].seconds)]
    restored["nested_longest"] = timed[nested[-1]]

    untrained = choose_rates(solver, plain, penalty, tuning, [chosen.method], config.rates)
    restored["unconditional"] = solver.restore(
        chosen.method, untrained[chosen.method].rate, plain, penalty, batch, timed=True
    )
    its_prior, its_penalty = study.vae_beliefs[name]
    decoder = Parameters(source.vae, its_prior)
    by_vae = choose_rates(solver, decoder, its_penalty, tuning, [nested[-1]], config.rates)
    restored["vae"] = solver.restore(
        nested[-1], by_vae[nested[-1]].rate, decoder, its_penalty, batch, timed=True
    )
    weight = best_weight(tuning, config.tv_weights) if kind.noise else 0.0
    restored["classical"] = restore_classically(kind, batch, weight)
    return (
        Outcome(batch, restored, {"joint": _curve(batch, timed, joint),
                                  "nested": _curve(batch, timed, nested)}),
        _results(name, batch, restored),
    )  # fmt: skip


def _within(
    choices: dict[Method, Choice],
    timed: dict[Method, Restored],
    methods: list[Method],
    seconds: float,
) -> Method:
    """The best, on the validation images, of what takes no longer; else the fastest."""
    in_time = [method for method in methods if timed[method].seconds <= seconds]
    if not in_time:
        return min(methods, key=lambda method: timed[method].seconds)
    return max(in_time, key=lambda method: choices[method].psnr)


def _quality(batch: Batch, restored: Restored) -> float:
    return psnr(float(batch.squared_errors(restored.images).mean()))


def _curve(
    batch: Batch, timed: dict[Method, Restored], methods: list[Method]
) -> list[tuple[float, float]]:
    return [(timed[method].seconds, _quality(batch, timed[method])) for method in methods]


def _results(name: str, batch: Batch, restored: dict[str, Restored]) -> Summary:
    """The flat results of a problem; the joint solve's have no suffix."""
    suffixes = {label: "" if label == "joint" else f"_{label}" for label in restored}
    summary: Summary = {
        f"psnr_{name}{suffixes[label]}": _quality(batch, made) for label, made in restored.items()
    }
    summary |= {
        f"seconds_{name}{suffixes[label]}": made.seconds for label, made in restored.items()
    }
    return summary


def _restore(config: Config, run: RunDirectory, source: Source) -> Checkpoint:
    """The newest undamaged checkpoint of the models trained for their tasks."""

    def template() -> TrainState:
        prior = Prior.standard(source.config.latent_dim, max(config.prior_components))
        one = Belief(prior, jnp.zeros(()))
        beliefs = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(KINDS)), one)
        return initial_state(config, source.joint, beliefs, run.record.seed)

    restored = restore_newest(run.checkpoints, jax.eval_shape(template), discard=False)
    if restored is None:
        raise UserError(
            f"{run.path} has no checkpoint yet; train first with `python -m experiments.inverse "
            f"train --run-dir {run.path} --resume`."
        )
    return restored
