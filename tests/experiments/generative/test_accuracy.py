"""Training whose inner accuracy follows it: resumed to the bit, and off unless asked for."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.common.data import ArrayImages, Split, batches
from experiments.common.runs import RunRecord, read_metrics, start_run
from experiments.common.step import training_step
from experiments.common.training import Schedule, fit
from experiments.generative.config import PRESETS
from experiments.generative.problem import build_generator, outer_optimizer
from experiments.generative.train import initial_state, step_of, training_loss

SHAPE, STEPS = (4, 4, 1), 12
PLAIN = replace(
    PRESETS["smoke"], hidden=16, decoder_hidden=16, latent_dim=3, batch_size=8, steps=STEPS,
    inner_steps=12, inner_step_size=0.3, warm_starts=0,
)  # fmt: skip
# Loose enough for fewer iterations at first, too tight for any number of them at last.
CONTROLLED = replace(PLAIN, error_allowed=(0.9, 1e-4), least_inner_steps=5)


def image_order():
    pixels = np.random.default_rng(0).random((24, *SHAPE), np.float32)
    return batches(Split(ArrayImages(pixels)), 8, seed=0)


def build(config):
    generator, params = build_generator(config, SHAPE, seed=0)
    return generator, initial_state(config, params, seed=0)


def test_resumed_it_ends_bit_for_bit_the_same(tmp_path):
    update = step_of(CONTROLLED, build(CONTROLLED)[0])
    runs, states = [], []
    for name, parts in (("whole", (STEPS,)), ("parts", (4, STEPS))):
        run = start_run(tmp_path / name, RunRecord.new("generative", "smoke", 0, CONTROLLED))
        for steps in parts:
            schedule = Schedule(steps, log_every=1, checkpoint_every=5)
            state, _ = fit(update, build(CONTROLLED)[1], image_order(), run, schedule)
        runs.append(run)
        states.append(jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))))
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)

    rows, others = ([{**row, "seconds": 0} for row in read_metrics(run.path)] for run in runs)
    assert rows == others
    used = [row["inner_steps"] for row in rows]
    assert used[0] == CONTROLLED.inner_steps
    assert min(used) < used[0]  # it fell, and
    assert used[-1] > min(used)  # rose again
    for row, following in zip(rows, used[1:], strict=False):
        exceeds = row["error_estimated"] > row["error_allowed"]
        assert (following >= row["inner_steps"]) if exceeds else (following <= row["inner_steps"])
    np.testing.assert_allclose([rows[0]["error_allowed"], rows[-1]["error_allowed"]], [0.9, 1e-4])


def test_a_budget_trains_as_that_many_iterations():
    """The first step spends `inner_steps`; the gradient is that of a training of so many."""
    generator, state = build(CONTROLLED)
    batch = next(image_order())
    fewer = replace(PLAIN, inner_steps=7)
    budgeted = state._replace(memory=state.memory._replace(accuracy=np.float32(7.2)))
    found, metrics = jax.jit(step_of(CONTROLLED, generator))(budgeted, batch)
    want, expected = jax.jit(step_of(fewer, generator))(build(fewer)[1], batch)
    assert metrics["inner_steps"] == 7
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], rtol=1e-4)
    # Adam's first step is 1e-3 long whatever the gradient: where that is small, rounding moves it.
    for got, leaf in zip(*map(jax.tree.leaves, (found.params, want.params)), strict=True):
        np.testing.assert_allclose(got, leaf, atol=2e-4)


def test_it_goes_with_warm_starts():
    config = replace(CONTROLLED, warm_starts=24)
    generator, state = build(config)
    batch = next(image_order())
    state, _ = jax.jit(step_of(config, generator))(state, batch)
    assert np.count_nonzero(state.memory.latents.owner >= 0) == 8
    assert float(state.memory.accuracy) != config.inner_steps


def test_without_it_the_training_step_is_the_plain_one():
    """The very program, and no state or metric more."""
    generator, state = build(PLAIN)
    batch = next(image_order())

    def loss(params, given):
        x0, _ = generator.start(params, 8)
        return training_loss(params, generator, PLAIN, given.batch["image"], given.keys, x0)

    optimizer = outer_optimizer(PLAIN, STEPS)
    plain = training_step(jax.grad(loss, has_aux=True), optimizer, contract=generator.contract)
    text = {
        jax.jit(update).lower(state, batch).as_text()
        for update in (plain, step_of(PLAIN, generator))
    }
    assert len(text) == 1
    assert not jax.tree.leaves(state.memory)
    _, metrics = jax.eval_shape(step_of(PLAIN, generator), state, batch)
    _, more = jax.eval_shape(step_of(CONTROLLED, generator), build(CONTROLLED)[1], batch)
    assert set(more) - set(metrics) == {"inner_steps", "error_allowed", "error_estimated"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"error_allowed": (0.1, 0.3)}, "that do not grow"),
        ({"least_inner_steps": 13}, "at least 13 and at most 12 inner iterations"),
    ],
)
def test_settings_out_of_range_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        replace(CONTROLLED, **change)
