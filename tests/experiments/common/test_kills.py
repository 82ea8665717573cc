"""Fifty SIGKILLs over one training run, at random moments of the whole life of a process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.checkpoint_files import check_undamaged, saved_steps
from experiments.common.checkpoints import restore_newest
from experiments.common.runs import read_metrics
from tests.experiments.common import toy

KILLS = 50
SETTINGS = toy.TASK.presets["long"]


# Children are forked from a process that has everything imported: of starting, which takes
# seconds, imports are the part in which nothing is at stake.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.experiments.common.toy"])


def live(preset: str, run: str, pause: float, cache: str, output: str) -> None:
    """What a process does: train to the end, from whatever it finds."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.environ[toy.PAUSE] = str(pause)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    toy.main(toy.TASK, ["train", "--resume", "--preset", preset, "--run-dir", run])


class Life:
    """A process that trains, from its start to its end.

    Args:
        preset: Of the toy.
        run: The run directory.
        pause: Seconds that a step takes.
        cache: Folder of compiled programs.
    """

    def __init__(self, preset: str, run: Path, pause: float, cache: Path):
        self.run, self.before = run, newest(run)
        self.output = run.parent / "output"
        self.output.write_text("")
        arguments = (preset, str(run), pause, str(cache), str(self.output))
        self.process = FORKS.Process(target=live, args=arguments)
        self.process.start()
        self.began = time.monotonic()

    def finish(self) -> None:
        """Wait for its regular end."""
        self.process.join()
        assert self.process.exitcode == 0, self.output.read_text()

    def wait_for_step(self) -> float:
        """Seconds until it has saved a step of its own."""
        while (saved := self.watch(time.monotonic() - self.began + 0.05)) is None:
            pass
        return saved

    def watch(self, seconds: float) -> float | None:
        """Wait until it is so old; its age when it saved a step of its own, or None."""
        saved = None
        while time.monotonic() - self.began < seconds:
            assert self.process.is_alive(), self.output.read_text()
            if saved is None and newest(self.run) > self.before:
                saved = time.monotonic() - self.began
            time.sleep(0.01)
        return saved

    def kill(self) -> str:
        """Kill it, and say what it was doing."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL, self.output.read_text()
        said = self.output.read_text()
        assert "Traceback" not in said
        assert "warning" not in said  # nothing damaged was found
        if self.before and "continuing" in said:
            assert f"continuing at step {self.before} of" in said
        folder = self.run / "checkpoints"
        if folder.is_dir() and any(not entry.name.isdigit() for entry in folder.iterdir()):
            return "saving"
        if newest(self.run) > self.before:
            return "training"
        return "restoring, first steps" if "run directory" in said else "starting"


def newest(run: Path) -> int:
    return max(saved_steps(run / "checkpoints"), default=0)


def final_state(run: Path) -> list[np.ndarray]:
    restored = restore_newest(run / "checkpoints", toy.initial(SETTINGS, 0), discard=False)
    assert restored.step == SETTINGS.steps
    key = jax.random.key_data(restored.state.key)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state._replace(key=key))]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run)]


@pytest.mark.slow
def test_fifty_kills_lose_nothing_and_change_no_bit(tmp_path, capsys):
    began = time.monotonic()
    undisturbed, run, cache = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "cache"
    Life("undisturbed", undisturbed, 0.0, cache).finish()
    life = Life("long", run, 0.05, cache)
    start_up = life.wait_for_step()  # with a warm cache, as all lives have
    life.kill()
    random = np.random.default_rng(0)
    moments: Counter[str] = Counter()
    saved = 0
    while moments.total() < KILLS:
        life = Life("long", run, start_up / 60, cache)
        age = random.uniform(0, 1.7 * start_up)
        # Other work on the machine makes starting slower or faster.
        start_up = life.watch(age) or max(start_up, age)
        moments[life.kill()] += 1
        assert newest(run) >= saved
        saved = newest(run)
        for step in saved_steps(run / "checkpoints"):
            check_undamaged(run / "checkpoints" / str(step))
    assert saved < SETTINGS.steps
    Life("long", run, 0.0, cache).finish()
    for one, other in zip(final_state(run), final_state(undisturbed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert losses(run) == losses(undisturbed)
    with capsys.disabled():
        seconds = time.monotonic() - began
        print(f"\n{KILLS} kills in {seconds:.0f} s, at step {saved} in the end: {dict(moments)}")
    assert moments["saving"] >= 3
    assert moments["training"] >= 3
    assert len(moments) == 4
