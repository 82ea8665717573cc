"""Evaluation of a run, from its directory and the data alone."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from experiments.adversarial import figures, robustness
from experiments.adversarial.attacks import Victim
from experiments.adversarial.config import Config
from experiments.adversarial.problem import build_network
from experiments.adversarial.speed import epoch_seconds, measure_speed
from experiments.adversarial.train import MODELS, initial_state, part_of
from experiments.common.checkpoints import restore_newest
from experiments.common.cli import Summary
from experiments.common.data import load_images
from experiments.common.devices import device_name
from experiments.common.errors import UserError
from experiments.common.runs import RunDirectory
from experiments.common.speed import Comparison
from experiments.common.terminal import say

_FEWER = 4  # the curve and the masking checks take one image in so many
_LEAST = 64  # but no fewer, if there are that many


def evaluate(config: Config, run: RunDirectory, data_root: Path | None) -> Summary:
    """Attack all trained models, and measure speed.

    Returns:
        The results; figures are written to the run directory.

    Raises:
        UserError: There is no checkpoint yet, or the images are not of the size trained on.
    """
    data = load_images(config.dataset, data_root)
    victims, notes = load_victims(config, run, data.shape)
    images = data.test.first(config.evaluation_images)
    assert data.test.labels is not None
    labels = data.test.labels[: len(images)]

    found = robustness.matrix(config, victims, images, labels)
    few = min(len(images), max(_LEAST, len(images) // _FEWER))
    say("radii, and signs of masked gradients")
    curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    checks: Summary = {}
    for model, victim in victims.items():
        curves[model] = robustness.radius_curve(config, victim, images[:few], labels[:few])
        checks |= robustness.masking_checks(
            config, model, victim, found[model], curves[model][2], images[:few], labels[:few]
        )
    # The joint-trained model if there is one; of an interrupted run, what was trained last.
    main = list(victims)[-1]
    say(f"measuring speed on the {main}-trained model")
    comparison = measure_speed(victims[main], data, config)
    epochs = epoch_seconds(victims[main], data, config, run.record.seed)

    figures.attacked_images(run.figures / "attacked.png", config, images, labels, found)
    figures.radius_curves(run.figures / "radius.png", config, curves)
    figures.attack_loss(run.figures / "attack_loss.png", comparison)
    return {
        **robustness.accuracies(found, labels),
        **checks,
        **_speed_summary(comparison),
        **{f"seconds_epoch_{name}": seconds for name, seconds in epochs.items()},
        **notes,
        "radius": config.radius,
        "norm": config.norm,
        "train_images": len(data.train),
        "test_images": len(images),
        "device": device_name(),
    }


def load_victims(
    config: Config, run: RunDirectory, shape: tuple[int, int, int]
) -> tuple[dict[str, Victim], Summary]:
    """The models of a run that have a checkpoint, and how long each was trained.

    Raises:
        UserError: None has, or the images are not of the size trained on.
    """
    network, params = build_network(config.sizes(shape), run.record.seed)
    template = jax.eval_shape(lambda: initial_state(config, params, run.record.seed))
    victims: dict[str, Victim] = {}
    notes: Summary = {}
    for model in MODELS:
        restored = restore_newest(part_of(run, model).checkpoints, template, discard=False)
        if restored is None:
            say(f"the {model}-trained model has no checkpoint yet: it is left out.")
            continue
        if restored.step < config.steps:
            say(f"the {model}-trained model is at step {restored.step} of {config.steps}.")
        victims[model] = Victim(network, restored.state.params)
        notes |= {f"seconds_train_{model}": restored.notes["seconds"], "step": restored.step}
    if not victims:
        raise UserError(
            f"{run.path} has no checkpoint yet; train first with `python -m "
            f"experiments.adversarial train --run-dir {run.path} --resume`."
        )
    return victims, notes


def _speed_summary(comparison: Comparison) -> Summary:
    """The comparison's numbers, and the one that the task is judged by.

    Where the published attack never reaches the target, it counts as having done so when its time
    was over: `speedup_attack` is a lower bound, and finite.
    """
    numbers = comparison.summary()
    return {"speedup_attack": numbers["speedup_published_at_least"], **numbers}
