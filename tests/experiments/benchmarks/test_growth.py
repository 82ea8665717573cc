"""The benchmarks of throughput, growth and mixed precision, and the plan, at sizes for a test."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from experiments.benchmarks import mixed_precision, plan, scaling, throughput
from experiments.benchmarks.timing import Seconds
from experiments.generative.config import PRESETS
from experiments.generative.problem import build_generator
from jdeq.nn import conv2d

SMALL = replace(
    PRESETS["smoke"], hidden=16, decoder_hidden=16, latent_dim=4, inner_steps=3, warm_starts=0
)
PAGE = Path(plan.__file__).parents[1] / "SCALING.md"


def test_throughput_of_a_step_and_its_memory():
    row = throughput.measure(replace(SMALL, batch_size=2), limit=60.0, repeats=2)
    assert row["runs"] == 2
    assert row["seconds"]["min"] > 0
    _, params = build_generator(SMALL, (8, 8, 1), seed=0)
    # Parameters and Adam's two moments go in; their new values take their place.
    kept = 3 * 4 * plan.numbers(params)
    images = 2 * 4 * 64
    assert kept + images <= row["bytes"]["arguments"] < kept + images + 200
    assert row["bytes"]["results"] < 1000  # metrics
    parts = ("temporary", "arguments", "results")
    assert row["bytes"]["total"] == sum(row["bytes"][part] for part in parts)
    assert row["peak_resident_bytes"] > row["bytes"]["total"]


def test_a_step_beyond_the_limit_is_measured_once():
    row = throughput.measure(replace(SMALL, batch_size=2), limit=0.0, repeats=2)
    assert row["runs"] == 1


def test_batches_grow_until_a_step_takes_too_long_and_rows_are_added(tmp_path, monkeypatch):
    def measured(config, limit, repeats):
        taken = {"median": config.batch_size / 10, "min": 0.01, "max": 99.0}
        row = throughput.memory(jax.jit(jnp.sin).lower(1.0).compile())
        return {
            "runs": repeats, "seconds": taken, "cpu_seconds": taken, "bytes": row,
            "compile_seconds": {"wall": 1.0}, "peak_resident_bytes": throughput.peak_resident(),
        }  # fmt: skip

    monkeypatch.setattr(throughput, "measure", measured)
    output, figure = tmp_path / "out.json", tmp_path / "figure.png"
    options = throughput.Options(output, figure, presets=("digits",), limit=1.5)
    for dtype in ("float32", "bfloat16"):
        throughput.main(replace(options, dtypes=(dtype,)))
    rows = json.loads(output.read_text())["rows"]
    assert [(row["state_dtype"], row["batch"]) for row in rows] == [
        (dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 4, 16)
    ]
    assert figure.stat().st_size > 0


def test_a_sweep_is_fitted_and_drawn(tmp_path):
    sweep = [scaling.Size(state=n) for n in (64, 128, 256)]
    taken = {str(size): Seconds([1.0], [2e-3 * size.state**2]) for size in sweep}
    row = scaling.summary("state", sweep, taken)
    assert row["exponent"] == pytest.approx(2, abs=1e-6)
    assert 0 < row["predicted_exponent"] < 1  # at these sizes the decoder has most of the work
    scaling.draw(tmp_path / "figure.png", {"state": row})
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_exponents_are_slopes_of_logarithms():
    sizes = [1, 3, 10, 40]
    assert scaling.exponent(sizes, [2 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_operations_are_those_of_the_products():
    # One iteration: W z, U x, V1 z, V2 h, and the products of each from the left.
    weights = 100 * 100 + 100 * 7 + 100 * 512 + 512 * 784
    size = scaling.Size(state=100, latent=7, iterations=1)
    assert size.operations() == 2 * 2 * weights
    assert replace(size, iterations=5).operations() == 5 * size.operations()


def test_a_solve_that_ends_early_is_refused(monkeypatch):
    size = scaling.Size(state=8, latent=2, iterations=6)
    assert jax.tree.leaves(scaling.solve(size, batch=2)())[0].shape == (2, 8)
    monkeypatch.setattr(scaling, "_STEP", 1e30)  # the penalty on x overflows
    with pytest.raises(RuntimeError, match=r"ended after [1-5] of 6"):
        scaling.solve(size, batch=2)()


def test_residuals_of_a_float32_solve_are_measured_as_it_reports_them():
    generator, params = build_generator(SMALL, (8, 8, 1), seed=0)
    images = jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 1), np.float32))
    x0, z0 = generator.start(params, 3)
    solution = jdeq.joint_solve(
        generator.problem, params, images, x0, z0, method=jdeq.joint.Descent(), max_steps=8
    )
    measured = mixed_precision.exact_residual(generator, params, images, solution.value)
    # Residuals are small differences in float32, and two programs round them differently.
    for name, expected in solution.residual._asdict().items():
        np.testing.assert_allclose(getattr(measured, name), expected, rtol=1e-3, err_msg=name)


def test_convolutions_of_a_program_are_found_wherever_they_are():
    def function(x, kernel):
        y = jax.jit(lambda x: conv2d(x, kernel))(x)
        return conv2d(y, jnp.ones((1, 1, 5, 2)), stride=2)

    x, kernel = jnp.ones((1, 4, 6, 3)), jnp.ones((3, 3, 3, 5))
    found = plan.convolutions(function, x, kernel)
    assert found == [24 * (3 + 5), 24 * 5 + 6 * 2]


def test_the_published_model_has_the_published_size():
    counts = plan.count(*plan.MODELS["64x64, published"])
    assert counts.parameters == 40_799_552
    assert counts.state == 245_760
    # Of the 3.2 GFLOP of the cell 3.02 are its blocks': two 3x3 convolutions of 5 c^2 channels.
    blocks = sum(2 * 2 * 9 * 5 * c * c * (2048 // c) ** 2 for c in (32, 64, 128, 256))
    assert 2 * blocks < counts.cell_operations < 2.5 * blocks


def values(line: str) -> list[float]:
    return [float(cell.replace(",", "")) for cell in line.strip("| ").split(" | ")[1:]]


def test_the_plan_says_what_the_models_give():
    page = {}
    for line in PAGE.read_text().splitlines():
        if re.match(r"\| [^|]+ \|( [\d.,]+ \|)+$", line):
            page[line.strip("| ").split(" | ")[0]] = values(line)
    computed = plan.rows()
    assert set(page) == set(computed)
    for name, numbers in computed.items():
        # Other versions of XLA count operations a little differently.
        np.testing.assert_allclose(page[name], numbers, rtol=0.02, err_msg=name)
