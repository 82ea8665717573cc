"""The training loop in adversity: preemption, full disks, vanished data, steps that are not finite.

Every run here is interrupted in this process; `test_training` and `test_kills` kill processes.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import checkpoints
from experiments.common.checkpoints import restore_newest, saved_steps
from experiments.common.data import Split, batches
from experiments.common.errors import UserError
from experiments.common.non_finite import load_non_finite
from experiments.common.runs import RunRecord, open_run, read_metrics, start_run
from experiments.common.training import Schedule, TrainingInterruptedError, fit
from jdeq import AugmentedState
from jdeq.joint import starts
from jdeq.solution import Result, Solution
from tests.experiments.common import commands, toy

RECORD = RunRecord.new("toy", "fast", 0, toy.Settings())


class FileImages:
    """Twelve images of one pixel, each in a file of its own."""

    shape, in_memory = (1, 1, 1), False

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for index in range(12):
            np.save(folder / f"{index}.npy", np.full((1, 1, 1), index, np.float32))

    def __len__(self):
        return 12

    def read(self, indices):
        return np.stack([np.load(self.folder / f"{index}.npy") for index in indices])


class Watched:
    """Batches that are written down, and call `action` before one of them."""

    def __init__(self, inner, at=None, action=None):
        self.inner, self.size, self.at, self.action = inner, inner.size, at, action
        self.seen = []

    def __next__(self):
        if len(self.seen) == self.at:
            self.action()
        batch = next(self.inner)
        self.seen.append(batch["index"].tolist())
        return batch

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


OPTIMIZER = optax.adam(optax.cosine_decay_schedule(0.1, 30))


def initial():
    like = AugmentedState(None, jnp.zeros((1, 2)), None)
    params = jnp.ones(2)
    return {
        "params": params,
        "optimizer": OPTIMIZER.init(params),
        "key": jax.random.key(5),
        "starts": starts.init(like, 12, keep=("x",)),
    }


def update(state, batch):
    """Every part of the state depends on all others and on the batch."""
    key, draw = jax.random.split(state["key"])
    cold = AugmentedState(None, jnp.zeros((4, 2)), None)
    x = starts.lookup(state["starts"], batch["index"], cold).x
    inputs = batch["image"][:, 0, 0] + jax.random.normal(draw, (4, 2)) + x
    value, gradient = jax.value_and_grad(lambda p: jnp.mean((inputs * p - 1) ** 2))(state["params"])
    updates, memory = OPTIMIZER.update(gradient, state["optimizer"])
    params = optax.apply_updates(state["params"], updates)
    codes = jnp.full((4,), Result.converged, jnp.int32)
    found = Solution(AugmentedState(None, x / 2 + params, None), codes, codes, jnp.zeros(4))
    store = starts.update(state["starts"], batch["index"], found)
    return {"params": params, "optimizer": memory, "key": key, "starts": store}, {"loss": value}


def train(folder, order):
    path = folder / "run"
    run = open_run(path, "toy") if path.exists() else start_run(path, RECORD)
    return fit(update, initial(), order, run, Schedule(30, 10, 6))[0]


def order_of(folder):
    return batches(Split(FileImages(folder / "images")), 4, 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    order = Watched(order_of(folder))
    return train(folder, order), order.seen, read_metrics(folder / "run")


@pytest.fixture(scope="module")
def preempted(tmp_path_factory):
    """The same, asked to stop in its 13th step, and continued."""
    folder = tmp_path_factory.mktemp("preempted")
    first = Watched(order_of(folder), 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterruptedError, match="stopped after step 14 of 30; it is saved"):
        train(folder, first)
    second = Watched(order_of(folder))
    return train(folder, second), first.seen + second.seen, read_metrics(folder / "run")


def test_after_preemption_no_batch_is_left_out_or_repeated(preempted, undisturbed):
    assert preempted[1] == undisturbed[1]


@pytest.mark.parametrize("part", ["params", "optimizer", "key", "starts"])
def test_after_preemption_each_part_of_the_state_is_the_same(preempted, undisturbed, part):
    one, other = preempted[0][part], undisturbed[0][part]
    if part == "key":
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_after_preemption_metrics_are_the_same_though_it_fell_between_two_rows(
    preempted, undisturbed
):
    for row, expected in zip(preempted[2], undisturbed[2], strict=True):
        assert (row["step"], row["loss"]) == (expected["step"], expected["loss"])
    seconds = [row["seconds"] for row in preempted[2]]
    assert seconds == sorted(seconds)


def test_a_notice_in_the_last_step_is_not_forgotten(tmp_path):
    last = Watched(order_of(tmp_path), 29, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterruptedError, match="after step 30 of 30"):
        train(tmp_path, last)
    assert saved_steps(tmp_path / "run" / "checkpoints")[-1] == 30


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    def publish(directory, step):
        deadline = time.monotonic() + 60
        while step == 6 and not read_metrics(tmp_path / "run"):  # which step 10 writes
            assert time.monotonic() < deadline
        real(directory, step)

    real = checkpoints.publish
    monkeypatch.setattr(checkpoints, "publish", publish)
    train(tmp_path, order_of(tmp_path))
    assert saved_steps(tmp_path / "run" / "checkpoints") == [18, 24, 30]


def test_preemption_while_a_checkpoint_is_written_saves_both(tmp_path, monkeypatch):
    hold = threading.Event()

    def publish(directory, step):
        assert hold.wait(60)
        real(directory, step)

    def notice():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.3, hold.set).start()

    real = checkpoints.publish
    monkeypatch.setattr(checkpoints, "publish", publish)
    with pytest.raises(TrainingInterruptedError, match="after step 8 of 30"):
        train(tmp_path, Watched(order_of(tmp_path), 7, notice))
    assert saved_steps(tmp_path / "run" / "checkpoints") == [6, 8]


def test_data_that_vanishes_stops_training_with_everything_saved(tmp_path, undisturbed):
    gone = tmp_path / "gone"
    order = Watched(order_of(tmp_path), 13, lambda: (tmp_path / "images").rename(gone))
    with pytest.raises(UserError, match=r"cannot be read any more: .*No such file.*--resume"):
        train(tmp_path, order)
    (step,) = saved_steps(tmp_path / "run" / "checkpoints")[-1:]
    assert step == len(order.seen) >= 13  # up to four batches were read ahead
    assert step % 6 != 0
    shutil.move(gone, tmp_path / "images")
    state = train(tmp_path, order_of(tmp_path))
    np.testing.assert_array_equal(state["params"], undisturbed[0]["params"])


def test_a_disk_that_is_full_while_a_checkpoint_is_written(tmp_path, capsys):
    commands.run(toy.TASK, "train", "--preset", "large", "--run-dir", tmp_path / "undisturbed")
    path = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, before[1]))
    try:
        message = commands.fail(toy.TASK, capsys, "train", "--preset", "large", "--run-dir", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the checkpoint of step 10 cannot be written" in message
    assert "File too large" in message
    assert list((path / "checkpoints").iterdir()) == []
    commands.run(toy.TASK, "train", "--resume", "--run-dir", path)
    template = toy.initial(toy.TASK.presets["large"], 0)
    one, other = (
        restore_newest(folder / "checkpoints", template, discard=False).state.params["weight"]
        for folder in (path, tmp_path / "undisturbed")
    )
    np.testing.assert_array_equal(one, other)


def test_a_disk_that_is_full_while_figures_are_drawn_is_one_sentence(tmp_path, capsys):
    def evaluate(settings, run, data_root):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "figure.png")

    task = dataclasses.replace(toy.TASK, evaluate=evaluate)
    message = commands.fail(task, capsys, "--run-dir", tmp_path / "run")
    assert "figure.png cannot be written or read (No space left on device)" in message
    assert f"--run-dir {tmp_path / 'run'} --resume" in message


POISONED = toy.TASK.presets["poisoned"]


def without_poison():
    """States before each step, and the steps that meet the poisoned image, by a plain loop."""
    order, step = toy.image_order(POISONED, 0), jax.jit(toy.step_of(POISONED))
    state, states, bad = toy.initial(POISONED, 0), [], []
    for number in range(1, POISONED.steps + 1):
        states.append(state)
        batch = next(order)
        after, _ = step(state, batch)
        if POISONED.poisoned in batch["index"]:
            bad.append(number)
            after = state._replace(key=after.key)
        state = after
    return [*states, state], bad


def test_a_step_that_is_not_finite_stops_and_can_be_studied(tmp_path, capsys):
    path = tmp_path / "run"
    message = commands.fail(toy.TASK, capsys, "train", "--preset", "poisoned", "--run-dir", path)
    states, bad = without_poison()
    assert f"training stopped because loss is not finite at step {bad[0]}" in message
    assert str(path / "non_finite") in message
    example = next(toy.image_order(POISONED, 0))
    found = load_non_finite(path / "non_finite", states[0], example)
    assert found.step == bad[0]
    assert POISONED.poisoned in found.batch["index"]
    before = states[bad[0] - 1]
    np.testing.assert_allclose(found.state.params["weight"], before.params["weight"], rtol=1e-6)
    _, metrics = jax.jit(toy.step_of(POISONED))(found.state, found.batch)
    assert np.isnan(metrics["loss"])
    again = commands.fail(toy.TASK, capsys, "train", "--resume", "--run-dir", path)
    assert again == message


def test_steps_that_are_not_finite_are_left_out_and_counted_when_asked(tmp_path):
    path = tmp_path / "run"
    commands.run(toy.TASK, "train", "--preset", "poisoned", "--run-dir", path, "--skip-non-finite")
    states, bad = without_poison()
    assert len(bad) > 2
    rows = read_metrics(path)
    for row in rows:
        inside = [step for step in bad if row["step"] - POISONED.log_every < step <= row["step"]]
        assert row["skipped_steps"] == len(inside)
        assert np.isfinite(row["loss"])
    restored = restore_newest(path / "checkpoints", states[0], discard=False).state
    np.testing.assert_allclose(restored.params["weight"], states[-1].params["weight"], rtol=1e-5)
    np.testing.assert_array_equal(
        jax.random.key_data(restored.key), jax.random.key_data(states[-1].key)
    )
    assert int(restored.optimizer[0].count) == POISONED.steps - len(bad)


def test_training_in_which_no_step_is_finite_stops_though_steps_may_be_left_out(tmp_path, capsys):
    message = commands.fail(
        toy.TASK, capsys, "train", "--preset", "explosive", "--run-dir", tmp_path / "run",
        "--skip-non-finite",
    )  # fmt: skip
    assert "no step since the last row of metrics was finite" in message
