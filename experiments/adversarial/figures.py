"""Figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.adversarial.config import Config
from experiments.adversarial.robustness import Matrix
from experiments.common import plots
from experiments.common.speed import Comparison

_SHOWN = 12  # images a row


_MODELS = {"clean": "clean-trained", "pgd": "PGD-trained", "joint": "joint-trained"}


def attacked_images(
    path: Path, config: Config, images: np.ndarray, labels: np.ndarray, found: Matrix
) -> None:
    """The first images, what the joint attack makes of them for each model, and what it adds."""
    rows = [plots.Row("test image", images[:_SHOWN])]
    for model, row in found.items():
        outcome = row["joint"]
        # Grey is no change; the largest change of any image shown is black or white.
        change = outcome.perturbation[:_SHOWN]
        largest = max(float(np.abs(change).max()), 1e-12)
        guesses = outcome.logits[:_SHOWN].argmax(-1)
        wrong = guesses != labels[:_SHOWN]
        answers = [f"read as {guess}" for guess in guesses]
        rows.append(plots.Row(_MODELS[model], outcome.images[:_SHOWN], answers, wrong))
        rows.append(plots.Row(f"change, at most {largest:.2f}", 0.5 + change / (2 * largest)))
    plots.annotated_rows(
        path, rows, f"Joint attacks, {config.norm} radius {config.radius:g}; wrong answers in red"
    )


def radius_curves(
    path: Path, config: Config, curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> None:
    """Accuracy and loss under the joint attack against the radius."""
    plots.curves(
        path,
        [
            {_MODELS[m]: plots.Curve(radii, shares) for m, (radii, shares, _) in curves.items()},
            {_MODELS[m]: plots.Curve(radii, losses) for m, (radii, _, losses) in curves.items()},
        ],
        titles=["Accuracy under the joint attack", "Its cross-entropy"],
        xlabels=[f"radius ({config.norm})"] * 2,
        ylabels=["accuracy", "mean cross-entropy"],
        log_y=False,
        marker="o",
    )


def attack_loss(path: Path, speed: Comparison) -> None:
    """Cross-entropy against time for the joint attack and PGD."""
    labels = {"joint": "joint", "nested": "PGD, tuned", "published": "PGD, published"}
    curves = {
        labels[kind]: plots.Curve.quartiles(
            1e3 * measured.seconds,
            np.where(np.isfinite(measured.objectives), -measured.objectives, np.nan),
        )
        for kind, measured in (
            ("joint", speed.joint),
            ("nested", speed.nested),
            ("published", speed.published),
        )
    }
    plots.curves(
        path,
        [curves],
        titles=["Attack on the joint-trained model (median, quartiles)"],
        xlabels=[f"time of {len(speed.joint.reached)} images together [ms]"],
        ylabels=["cross-entropy at the equilibrium"],
        log_x=True,
    )
