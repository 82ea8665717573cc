"""The figure of a speed comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.common import plots
from experiments.common.speed import Comparison

_LABELS = {"joint": "joint", "nested": "nested, tuned", "published": "nested, published"}
_SMALLEST_GAP = 1e-5  # the noise of float32 in the objective


def objective_over_time(path: Path, speed: Comparison, name: str, problems: str) -> None:
    """How far each method is from the best objective over time, medians and quartiles.

    Args:
        path: The picture.
        speed: The comparison.
        name: What the objective is called.
        problems: What the problems are called, in the plural.
    """
    curves = {
        _LABELS[kind]: plots.Curve.quartiles(1e3 * seconds, np.maximum(gap, _SMALLEST_GAP))
        for kind, (seconds, gap) in speed.gaps().items()
    }
    plots.curves(
        path,
        [curves],
        titles=[f"{name} (median and quartiles over {problems})"],
        xlabels=[f"time of {len(speed.joint.reached)} problems together [ms]"],
        ylabels=["(objective - best) / (first - best)"],
        log_x=True,
    )
