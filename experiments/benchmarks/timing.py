"""What all benchmarks of time share: runs in turns, medians with their spread, versions."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import numpy as np


class Seconds(NamedTuple):
    """What runs took.

    Attributes:
        wall: by the clock.
        cpu: of all threads of this process: the work, whatever else the machine does meanwhile.
            Threads that wait without sleeping count too.
    """

    wall: Any
    cpu: Any


def seconds(run: Callable[[], Any]) -> Seconds:
    """Time of one run; what it returns is waited for, arrays of other libraries pass."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(
    contestants: Mapping[str, Callable[[], Any]],
    repeats: int,
    limit: float = float("inf"),
    fewest: int = 5,
) -> dict[str, Seconds]:
    """Seconds, lists of them, of every contestant in each round.

    A round times every contestant once, so that a machine that becomes slow is so for all of them.
    There are ``repeats`` rounds, or as many as ``limit`` seconds allow, but ``fewest`` at least.
    """
    for run in contestants.values():
        jax.block_until_ready(run())
    samples: dict[str, list[Seconds]] = {name: [] for name in contestants}
    started = time.perf_counter()
    for number in range(repeats):
        if number >= fewest and time.perf_counter() - started > limit:
            break
        for name, run in contestants.items():
            samples[name].append(seconds(run))
    return {name: Seconds(*map(list, zip(*runs, strict=True))) for name, runs in samples.items()}


def spread(values: Any, digits: int = 5) -> dict[str, float]:
    """Median, minimum and maximum, to so many significant digits."""
    values = np.asarray(values, float)
    parts = {"median": np.median(values), "min": values.min(), "max": values.max()}
    return {name: float(f"{part:.{digits}g}") for name, part in parts.items()}


def surroundings(*packages: str) -> dict[str, Any]:
    """Where a measurement was taken: device, processor, cores, load and versions of packages."""
    versions = {}
    for package in ("jdeq", "jax", "jaxlib", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": str(jax.devices()[0]),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
    }
