"""Figures, drawn without a display."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.common.files import write_atomically
from jdeq import Diagnosis, Result

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    # Distinct for the colour-blind: Okabe and Ito's palette.
    "axes.prop_cycle": cycler(
        color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    ),
}
_DPI = 150
_IMAGE, _LETTER, _NOTE = 0.62, 0.075, 0.17  # inches
_FLAG = "#D55E00"
_FEW = 24
"""Up to so many problems each is marked by a dot."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A median with its quartiles.

    Attributes:
        x: Where, [K].
        middle: Median, [K].
        low: Lower quartile, [K]; None for a bare line.
        high: Upper quartile, [K].
    """

    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @classmethod
    def quartiles(cls, x: np.ndarray, values: np.ndarray) -> Curve:
        """The median and quartiles of `values` [K, N] over its last axis, of what is finite."""
        known = np.where(np.isfinite(values), values, np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # where nothing is known: a gap
            low, middle, high = np.nanpercentile(known, (25, 50, 75), axis=-1)
        return cls(x, middle, low, high)


def held(values: np.ndarray) -> np.ndarray:
    """The history [K, N] of problems that stop one by one: a finished one keeps its last value.

    Quartiles over those that still run would be quartiles of ever fewer, ever worse problems.
    """
    steps = np.arange(len(values))[:, None]
    last = np.maximum.accumulate(np.where(np.isfinite(values), steps, 0), axis=0)
    return np.take_along_axis(values, last, axis=0)


@dataclass(frozen=True, eq=False)
class Row:
    """A row of images.

    Attributes:
        label: Beside the row.
        images: [N, H, W, C] in [0, 1] with 1 or 3 channels.
        notes: Above each image, or none.
        flagged: Which notes stand out, bool [N]; None for none.
    """

    label: str
    images: np.ndarray
    notes: Sequence[str] = ()
    flagged: np.ndarray | None = None


def image_rows(path: Path, rows: Mapping[str, np.ndarray], title: str) -> None:
    """Save labelled rows of images.

    Args:
        path: The png.
        rows: Label to images [N, H, W, C] in [0, 1] with 1 or 3 channels; the same N in each row.
        title: Heading of the figure.
    """
    annotated_rows(path, [Row(label, images) for label, images in rows.items()], title)


def annotated_rows(path: Path, rows: Sequence[Row], title: str) -> None:
    """Save labelled rows of images with notes above them.

    Args:
        path: The png.
        rows: The same number and sizes of images in each.
        title: Heading of the figure.
    """
    count = max(len(row.images) for row in rows)
    height, width = rows[0].images.shape[1:3]
    letters = max(len(line) for row in rows for line in row.label.split("\n"))
    noted = sum(1 for row in rows if row.notes)
    with mpl.rc_context(_STYLE):
        figure = Figure(
            figsize=(
                _IMAGE * count + _LETTER * letters + 0.4,
                _IMAGE * len(rows) * height / width + _NOTE * noted + 0.55,
            ),
            layout="constrained",
        )
        grid = figure.subplots(len(rows), count, squeeze=False)
        for axes, row in zip(grid, rows, strict=True):
            for axis, image in zip(axes, row.images, strict=True):
                _show(axis, image)
            flagged = np.zeros(len(row.images), bool) if row.flagged is None else row.flagged
            for axis, note, stands_out in zip(axes, row.notes, flagged, strict=False):
                axis.set_title(note, fontsize=8, pad=2, color=_FLAG if stands_out else "0.4")
            axes[0].set_ylabel(row.label, rotation=0, ha="right", va="center")
        figure.suptitle(title)
        _save(figure, path)


def image_grid(path: Path, images: np.ndarray, columns: int, title: str) -> None:
    """Save images as a grid, row by row.

    Args:
        path: The png.
        images: [N, H, W, C] in [0, 1] with 1 or 3 channels, N a multiple of `columns`.
        columns: Images a row.
        title: Heading of the figure.
    """
    rows = {" " * row: images[row * columns :][:columns] for row in range(len(images) // columns)}
    image_rows(path, rows, title)


def curves(
    path: Path,
    panels: Sequence[Mapping[str, Curve]],
    *,
    titles: Sequence[str],
    xlabels: Sequence[str],
    ylabels: Sequence[str],
    log_x: bool = False,
    log_y: bool = True,
    marker: str | None = None,
) -> None:
    """Save panels of curves side by side.

    Args:
        path: The png.
        panels: For each panel, label to curve.
        titles: One a panel.
        xlabels: One a panel.
        ylabels: One a panel.
        log_x: Whether the horizontal axes are logarithmic.
        log_y: Whether the vertical axes are logarithmic.
        marker: Matplotlib's sign for each point, or None.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 3.5), layout="constrained")
        for number, axis in enumerate(figure.subplots(1, len(panels), squeeze=False)[0]):
            for label, curve in panels[number].items():
                (line,) = axis.plot(curve.x, curve.middle, label=label, marker=marker, ms=4)
                if curve.low is not None and curve.high is not None:
                    axis.fill_between(
                        curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.18, lw=0
                    )
            axis.set(
                title=titles[number],
                xlabel=xlabels[number],
                ylabel=ylabels[number],
                xscale="log" if log_x else "linear",
            )
            # A logarithmic axis without a positive number cannot be drawn.
            if log_y and any(np.any(curve.middle > 0) for curve in panels[number].values()):
                axis.set_yscale("log", nonpositive="mask")
                _label_logarithms(axis.yaxis)
            if log_x:
                _label_logarithms(axis.xaxis)
            axis.legend()
        _save(figure, path)


def fits(
    path: Path,
    x: np.ndarray,
    lines: Mapping[str, np.ndarray],
    points: tuple[np.ndarray, np.ndarray],
    title: str,
) -> None:
    """Save one panel a task: lines and the points that were fitted.

    Args:
        path: The png.
        x: Where the lines are known, [tasks, K], increasing.
        lines: Label to values, [tasks, K].
        points: (x, y) of the points, [tasks, n] each.
        title: Heading of the figure.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.2 * len(x) + 0.8, 3.0), layout="constrained")
        panels = figure.subplots(1, len(x), squeeze=False, sharey=True)[0]
        for number, axis in enumerate(panels):
            for label, values in lines.items():
                axis.plot(x[number], values[number], label=label)
            axis.plot(points[0][number], points[1][number], "o", color="0.2", label="support")
            axis.set_xlabel("input")
        panels[0].set_ylabel("value")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        figure.suptitle(title)
        _save(figure, path)


def diagnosis(path: Path, found: Diagnosis, title: str) -> None:
    """Save the picture of a diagnosis: of each number, how it is distributed over the problems.

    Args:
        path: The png.
        found: What `jdeq.diagnose` returned.
        title: Heading of the figure, above the outcomes.
    """
    codes = np.asarray(found.solution.result)
    outcomes = {code.name.replace("_", " "): int(np.sum(codes == code)) for code in Result}
    heading = ", ".join(f"{count} {name}" for name, count in outcomes.items() if count)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 6.4), layout="constrained")
        residuals, radii, conditions, steps = figure.subplots(2, 2).flat
        blocks = ("state", "adjoint", "stationarity")
        _distributions(residuals, {name: getattr(found.relative, name) for name in blocks})
        residuals.set(title="KKT residuals, relative to the size of their block", xscale="log")
        _distributions(
            radii, {"cell, df/dz": found.state_radius, "joint map": found.augmented_radius}
        )
        radii.axvline(1, color="0.4", lw=1, ls="--")
        radii.text(
            1, 0.5, " diverges", rotation=90, color="0.4", va="center",
            transform=radii.get_xaxis_transform(),
        )  # fmt: skip
        radii.set(title="Spectral radius at the solution")
        _distributions(
            conditions,
            {"Hessian along x": found.hessian_condition, "tangent kernel": found.kernel_condition},
        )
        conditions.set(title="Condition number", xscale="log")
        _distributions(
            steps, {"largest stable": found.largest_stable_step, "looked at": found.step_size}
        )
        steps.set(title="Step of gradient descent on x", xscale="log")
        for axis in (residuals, conditions):
            axis.set_ylabel("share of problems up to there")
        for axis in (residuals, conditions, steps):
            _label_logarithms(axis.xaxis)
        for axis in (residuals, radii, conditions, steps):
            axis.set_ylim(0, 1.03)
            axis.legend(loc="best")
        figure.suptitle(f"{title}: {len(codes)} problems, {heading}")
        _save(figure, path)


def _distributions(axis: Axes, curves: Mapping[str, Any]) -> None:
    """Cumulative shares of all problems; what is not finite leaves its curve below one."""
    for label, values in curves.items():
        known = np.asarray(values, np.float64)
        ordered = np.sort(known[np.isfinite(known)])
        missing = len(known) - len(ordered)
        shares = np.arange(1, len(ordered) + 1) / len(known)
        if missing:
            label = f"{label} ({missing} not finite)"
        marker = "o" if len(known) <= _FEW else None
        (line,) = axis.step(ordered, shares, where="post", label=label, marker=marker, ms=4)
        if len(ordered):
            axis.plot([ordered[0]] * 2, [0, shares[0]], color=line.get_color())


def _label_logarithms(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 where the range is too short for powers of ten alone."""
    low, high = axis.get_view_interval()
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _show(axis: Axes, image: np.ndarray) -> None:
    grey = image.shape[-1] == 1
    axis.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=_DPI)
    write_atomically(path, content.getvalue())
