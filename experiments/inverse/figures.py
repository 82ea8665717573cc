"""The figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.common import plots
from experiments.inverse.measurements import KINDS, Kind
from experiments.inverse.solvers import Batch, Restored

_SHOWN = 12  # images a row
_HIDDEN = (0.34, 0.71, 0.91)  # a colour, which no pixel has that is seen
_LABELS = {
    "joint": "joint, trained\nfor the task",
    "unconditional": "joint, no task",
    "vae": "autoencoder",
    "nested": "nested,\nsame time",
    "classical": "classical",
}


def restorations(path: Path, kind: Kind, batch: Batch, restored: Mapping[str, Restored]) -> None:
    """Originals, what was observed, and what each method made of it; the whole in rows."""
    count = len(batch.clean)
    # From first to last: where images are sorted by class, the first would be of a few classes.
    shown = np.linspace(0, count - 1, min(_SHOWN, count)).astype(int)
    observed = np.clip(np.asarray(batch.observed)[shown], 0, 1)
    seen = np.asarray(batch.how.mask)[shown] > 0
    if not seen.all():
        observed = np.where(seen, observed, np.array(_HIDDEN))
    rows = {"original": batch.clean[shown], "observed": observed}
    rows |= {label: restored[name].images[shown] for name, label in _LABELS.items()}
    plots.image_rows(path, rows, kind.label)


def psnr_over_time(
    folder: Path,
    problems: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    count: int,
) -> None:
    """What solves of growing length reach, joint and nested: a panel for each problem.

    Args:
        folder: Of `psnr_over_time.png` and `psnr_over_time_super.png`.
        problems: Problem to method to (seconds, PSNR) of each length.
        count: Images solved together.
    """
    for suffix, chosen in (
        ("", [name for name in problems if KINDS[name].factor == 1]),
        ("_super", [name for name in problems if KINDS[name].factor > 1]),
    ):
        plots.curves(
            folder / f"psnr_over_time{suffix}.png",
            [
                {
                    method: plots.Curve(*np.array(points, np.float64).T)
                    for method, points in problems[name].items()
                }
                for name in chosen
            ],
            titles=[KINDS[name].label for name in chosen],
            xlabels=[f"time of {count} images together [s]"] * len(chosen),
            ylabels=["PSNR [dB]"] * len(chosen),
            log_x=True,
            log_y=False,
            marker="o",
        )
