"""Training on eight simulated devices, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.parallel import spread_axis
from experiments.common.step import split_each
from tests.experiments.common.hlo import collectives, loops
from tests.experiments.common.small_tasks import BATCH, HIDDEN, TASKS

ROOT = Path(__file__).parents[3]
QUICK = ("generative", "generative-controlled")  # those that have a test of their own


def found_of(tasks, model_devices=1, count=8):
    """What `many_devices` finds, by task."""
    command = [sys.executable, "-m", "tests.experiments.common.many_devices"]
    done = subprocess.run(
        [*command, ",".join(tasks), str(model_devices)],
        cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_as_on_one_device(found):
    assert found["params"] < 1e-5
    assert found["left_out"] < 0.05
    assert found["metrics"]["loss"] < 1e-5
    assert found["metrics"]["gradient_norm"] < 1e-5


def assert_devices_meet_once_a_step(found):
    assert found["loops"] > 0
    assert "all-reduce" in found["collectives"]  # the mean of the gradients
    assert found["collectives_in_loops"] == []


def test_eight_devices_train_as_one_and_solve_each_their_part():
    everything = found_of(["generative"])
    found = everything["generative"]
    assert_as_on_one_device(found)
    assert_devices_meet_once_a_step(found)
    assert found["devices"] == 8
    # Of the states that the loops iterate there is an eighth on each device, and nowhere all.
    assert found["parts_in_loops"] > 0
    assert found["whole_states_in_loops"] == 0
    # What XLA makes of a loop that stops when all problems have finished: the check can fail.
    assert "all-reduce" in everything["control"]


def test_eight_devices_agree_on_the_iterations_of_a_step():
    found = found_of(["generative-controlled"])["generative-controlled"]
    assert_as_on_one_device(found)
    assert_devices_meet_once_a_step(found)
    assert found["metrics"]["inner_steps"] == 0
    assert found["metrics"]["error_estimated"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task not in QUICK])
def test_every_task_trains_on_eight_devices_as_on_one(task):
    found = found_of([task])[task]
    assert found["devices"] == 8
    assert_as_on_one_device(found)
    if found["loops"]:
        assert_devices_meet_once_a_step(found)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generative", "inverse", "adversarial", "meta"])
def test_a_command_trains_and_evaluates_on_two_devices(task, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{task}", "--preset", "smoke", "--run-dir", "run"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model_devices"),
    [("generative", 2), ("generative", 8), ("generative-multiscale", 2)],
)
def test_parameters_spread_over_devices_train_as_on_one(task, model_devices):
    found = found_of([task], model_devices)[task]
    assert_as_on_one_device(found)
    assert found["devices"] == 8
    assert found["smallest_share"] == 1 / model_devices


def test_large_arrays_are_spread_along_their_longest_axis_that_divides():
    assert spread_axis((3, 3, 64, 128), 4) == 3
    assert spread_axis((513, 64), 4) == 1
    assert spread_axis((64, 64), 2) == 1
    assert spread_axis((513, 65), 4) is None
    assert spread_axis((8, 8), 4) is None  # small
    assert spread_axis((64, 64), 1) is None
    assert spread_axis((), 2) is None


def test_loops_are_read_with_what_they_call():
    text = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}
%inner (p: f32[4,40]) -> f32[4,40] {
  %r = f32[4,40] all-reduce(%p), to_apply=%sum
}
%body (t: (f32[4,40])) -> (f32[4,40]) {
  %c = f32[4,40] call(%x), to_apply=%inner
}
%condition (t: (f32[4,40])) -> pred[] {
  ROOT %less = pred[] compare(%k, %n), direction=LT
}
ENTRY %main (p: f32[16,40]) -> f32[16,40] {
  %g = f32[16,40] all-gather-start(%p), dimensions={0}
  %w = (f32[4,40]) while(%g), condition=%condition, body=%body
}
"""
    (loop,) = loops(text)
    assert collectives(loop) == ["all-reduce"]
    assert collectives(text) == ["all-reduce", "all-gather"]
    assert "compare" in loop
    assert f"f32[{BATCH},{HIDDEN}]" in text
    assert f"f32[{BATCH},{HIDDEN}]" not in loop


@pytest.mark.slow
def test_a_batch_that_does_not_divide_by_all_devices_is_spread_over_some():
    code = """
import jax, numpy as np
from experiments.common.parallel import Devices, local_rows, mesh_for
assert mesh_for(8).size == 4 and mesh_for(6).size == 2 and mesh_for(5).size == 1
assert local_rows(6) == slice(0, 6)
placed = Devices(6).spread({"image": np.ones((6, 3), np.float32)})["image"]
assert [part.data.shape for part in placed.addressable_shards] == [(3, 3)] * 2
"""
    flags = {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | flags, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a batch of 6 is spread over 2 of 4 devices" in done.stdout


def test_random_numbers_of_an_example_do_not_depend_on_its_place():
    keys = jax.random.split(jax.random.key(0), 6)
    one, other = split_each(keys)
    again, _ = split_each(keys[3:])
    np.testing.assert_array_equal(jax.random.key_data(one[3:]), jax.random.key_data(again))
    assert not np.array_equal(jax.random.key_data(one), jax.random.key_data(other))
