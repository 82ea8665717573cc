"""How robust the models are: the matrix of attacks, the curve over radii, masking checks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from experiments.adversarial.attacks import (
    FGSM,
    PGD,
    Attack,
    Attacked,
    Joint,
    Noise,
    Transfer,
    Victim,
    attack,
)
from experiments.adversarial.config import Config
from experiments.common.terminal import say
from jdeq.joint import InnerSolve
from jdeq.solvers import Anderson

Matrix = dict[str, dict[str, Attacked]]
Numbers = dict[str, float | int | str]

_Z = 1.959964  # quantile of the normal distribution for 95 %
# From the last step's solution a short window does. Rougher solves made the longest attack weaker.
_WARM = InnerSolve(Anderson(2), rtol=1e-3, warm_start=True)
_FAR = 8.0  # radii within which every image can be turned into another


def attacks(config: Config) -> dict[str, Attack]:
    """The attacks of the matrix, but for the clean images and the transfer."""
    return {
        "joint": joint_attack(config),
        "fgsm": FGSM(config.norm),
        "pgd20": PGD(config.norm, 20),
        "pgd100_restarts": PGD(
            config.norm, config.long_steps, restarts=config.restarts, inner=_WARM
        ),
    }


def joint_attack(config: Config) -> Joint:
    """The joint attack of the evaluation."""
    return Joint(
        config.norm,
        config.attack_steps,
        config.attack_rate,
        config.attack_momentum,
        config.attack_hold,
    )


def matrix(
    config: Config, victims: Mapping[str, Victim], images: np.ndarray, labels: np.ndarray
) -> Matrix:
    """Every model under every attack: `matrix[model][attack]`, all on the same images."""
    found: Matrix = {model: {} for model in victims}
    for model, victim in victims.items():
        methods: dict[str, Attack] = {"clean": FGSM(config.norm), **attacks(config)}
        source = source_of(model, victims)
        if source is not None:
            methods["transfer"] = Transfer(victims[source], joint_attack(config))
        for name, method in methods.items():
            radius = 0.0 if name == "clean" else config.radius
            outcome = attack(
                method, victim, images, labels, radius, batch_size=config.evaluation_batch
            )
            found[model][name] = outcome
            say(f"{model}-trained, {name}: accuracy {outcome.correct(labels).mean():.2%}")
    return found


def source_of(model: str, victims: Mapping[str, Victim]) -> str | None:
    """The model whose attacks are tried on this one: another one that was trained to withstand."""
    order = [name for name in ("joint", "pgd", "clean") if name in victims and name != model]
    return order[0] if order else None


def accuracies(found: Matrix, labels: np.ndarray) -> Numbers:
    """Accuracies with 95 % intervals, and joint-trained minus PGD-trained, paired by image."""
    numbers: Numbers = {}
    correct = {
        model: {name: outcome.correct(labels) for name, outcome in row.items()}
        for model, row in found.items()
    }
    for model, row in correct.items():
        for name, hits in row.items():
            low, high = wilson_interval(hits)
            key = f"{model}_accuracy_{name}"
            numbers |= {key: float(hits.mean()), f"{key}_low": low, f"{key}_high": high}
        white_box = [row[name] for name in ("joint", "fgsm", "pgd20", "pgd100_restarts")]
        numbers[f"{model}_accuracy_worst"] = float(np.all(white_box, axis=0).mean())
    if {"joint", "pgd"} <= set(correct):
        for name, hits in correct["joint"].items():
            middle, low, high = paired_difference(hits, correct["pgd"][name])
            key = f"joint_minus_pgd_{name}"
            numbers |= {key: middle, f"{key}_low": low, f"{key}_high": high}
    return numbers


def wilson_interval(hits: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    count, share = len(hits), float(np.mean(hits))
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    spread = np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) * _Z
    spread /= 1 + _Z**2 / count
    return float(max(middle - spread, 0.0)), float(min(middle + spread, 1.0))


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Mean difference of two shares on the same images, and its normal 95 % interval."""
    difference = first.astype(float) - second.astype(float)
    middle = float(difference.mean())
    spread = _Z * float(difference.std(ddof=1)) / np.sqrt(len(difference))
    return middle, middle - spread, middle + spread


def radius_curve(
    config: Config, victim: Victim, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy and mean cross-entropy under the joint attack: (radii, accuracies, losses)."""
    radii = np.array([0.0, *config.radii]) * config.radius
    outcomes = [
        attack(
            joint_attack(config), victim, images, labels, float(radius),
            batch_size=config.evaluation_batch,
        )
        for radius in radii
    ]  # fmt: skip
    shares = np.array([outcome.correct(labels).mean() for outcome in outcomes])
    return radii, shares, np.array([outcome.loss.mean() for outcome in outcomes])


def masking_checks(
    config: Config,
    model: str,
    victim: Victim,
    row: Mapping[str, Attacked],
    losses: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
) -> Numbers:
    """Signs of gradients that hide rather than tell where the model is weak.

    Args:
        config: Settings.
        model: Name of the model.
        victim: The model.
        row: Its row of the matrix, on more images than these, these first.
        losses: Mean loss at growing radii.
        images: What the checks attack.
        labels: Their labels.

    Returns:
        `least_rise_radius` and `least_rise_steps`: the least that the mean loss rises from one
        radius to the next, and from 1 (FGSM) to 20 to the most of PGD's steps, both relative and
        both at least about 0 where nothing is masked; `accuracy_random`: under random directions
        of full length, far above that under attacks; `accuracy_far`: at a radius at which a sound
        attack fools every model; `transfer_minus_pgd20`: accuracy under the transfer attack minus
        that under PGD, above 0 where gradients lead.
    """
    shared = {"batch_size": config.evaluation_batch}
    by_steps = np.array([row[name].loss.mean() for name in ("fgsm", "pgd20", "pgd100_restarts")])
    noise = attack(Noise(config.norm), victim, images, labels, config.radius, **shared)
    far = _FAR * config.radius
    distant = attack(joint_attack(config), victim, images, labels, far, **shared)
    numbers = {
        "least_rise_radius": _least_rise(losses),
        "least_rise_steps": _least_rise(by_steps),
        "accuracy_random": float(noise.correct(labels).mean()),
        "accuracy_far": float(distant.correct(labels).mean()),
    }
    if "transfer" in row:
        count = len(labels)
        hits = [row[name].logits[:count].argmax(-1) == labels for name in ("transfer", "pgd20")]
        numbers["transfer_minus_pgd20"] = float(hits[0].mean() - hits[1].mean())
    return {f"{model}_{name}": value for name, value in numbers.items()}


def _least_rise(losses: np.ndarray) -> float:
    return float(np.min(np.diff(losses) / losses[1:]))
