"""Figures: written whole, and of the content they were given."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from PIL import Image

import jdeq
from experiments.common.plots import (
    Curve,
    Row,
    annotated_rows,
    curves,
    diagnosis,
    fits,
    held,
    image_grid,
    image_rows,
)


def width(path):
    with Image.open(path) as image:
        return image.width


def brightness(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).mean()


def test_grids_of_grey_and_colour_images(tmp_path):
    dark, bright = np.zeros((6, 5, 4, 1)), np.ones((6, 5, 4, 1))
    image_rows(tmp_path / "dark.png", {"a": dark, "b": dark}, "title")
    image_rows(tmp_path / "bright.png", {"a": bright, "b": bright}, "title")
    assert brightness(tmp_path / "bright.png") > brightness(tmp_path / "dark.png") + 60
    image_grid(tmp_path / "colour.png", np.random.default_rng(0).random((8, 5, 4, 3)), 4, "title")
    assert width(tmp_path / "colour.png") > 100
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_of_the_same_label_are_all_drawn_and_notes_stand_out(tmp_path):
    images = np.full((3, 5, 5, 1), 0.5)
    rows = [Row("change, at most 0.30", images), Row("change, at most 0.30", images)]
    annotated_rows(tmp_path / "two.png", rows, "title")
    annotated_rows(tmp_path / "one.png", rows[:1], "title")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.height > one.height + 50
    noted = [Row("row", images, ["read as 3"] * 3, np.array([True, False, False]))]
    annotated_rows(tmp_path / "noted.png", noted, "title")
    with Image.open(tmp_path / "noted.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.any((pixels[..., 0] > 150) & (pixels[..., 2] < 80)), "no note in the flag's colour"


def test_a_finished_problem_holds_its_last_value():
    history = np.array([[4.0, 3.0], [2.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(held(history), [[4, 3], [2, 3], [2, 3]])
    assert np.isnan(held(np.full((2, 1), np.nan))).all()


def test_fits_are_drawn_with_one_legend(tmp_path):
    x = np.linspace(0, 1, 5) * np.ones((2, 1))
    fits(tmp_path / "fits.png", x, {"truth": x, "fitted": -x}, (x[:, :2], x[:, :2]), "title")
    assert width(tmp_path / "fits.png") > 500


def test_curves_without_a_positive_number_are_drawn_all_the_same(tmp_path):
    unknown = Curve.quartiles(np.array([1.0, 2.0]), np.array([[np.nan, np.inf], [np.nan, 0.0]]))
    names = {"titles": ["a"], "xlabels": ["x"], "ylabels": ["y"]}
    curves(tmp_path / "curves.png", [{"joint": unknown}], **names)
    assert width(tmp_path / "curves.png") > 100


def test_curves_show_median_and_quartiles(tmp_path):
    values = np.array([[1.0, 2.0, 3.0, np.nan], [4.0, 4.0, 4.0, 4.0]])
    curve = Curve.quartiles(np.array([0.0, 1.0]), values)
    np.testing.assert_allclose(curve.middle, [2, 4])
    np.testing.assert_allclose(curve.low, [1.5, 4])
    curves(
        tmp_path / "curves.png",
        [{"joint": curve}, {"nested": Curve(curve.x, curve.middle)}],
        titles=["a", "b"],
        xlabels=["x", "x"],
        ylabels=["y", "y"],
    )
    assert width(tmp_path / "curves.png") > 100


def test_the_picture_of_a_diagnosis_of_any_size_and_of_bad_problems(tmp_path):
    def found(count):
        column = jnp.linspace(0.5, 1.5, count)
        start = jdeq.AugmentedState(*[jnp.zeros((count, 1))] * 3)
        residual = jdeq.KKTResidual(column, column, column)
        codes = jnp.zeros(count, jnp.int32)
        solution = jdeq.Solution(start, codes, codes, residual)
        return jdeq.Diagnosis(solution, residual, *[column] * 9)

    for count in (1, 100):
        diagnosis(tmp_path / f"{count}.png", found(count), "title")
        assert width(tmp_path / f"{count}.png") > 100
    sick = dataclasses.replace(found(3), state_radius=jnp.full(3, jnp.nan))
    diagnosis(tmp_path / "sick.png", sick, "title")
    assert brightness(tmp_path / "sick.png") != brightness(tmp_path / "1.png")
