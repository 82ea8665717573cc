"""How many devices a run computes on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from experiments.common.devices import compile_quickly

PROGRAM = """
import sys, jax
from experiments.common import devices
devices._cores = lambda: int(sys.argv[1])
devices.use_all_cores()
print(len(jax.devices()))
devices.use_all_cores()  # jax has been used: nothing changes, nothing is raised
"""


def devices_of(cores, **environment):
    plain = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cores)],
        env=plain | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (6, 4), (64, 8)])
def test_cores_become_devices(cores, count):
    assert devices_of(cores) == count


def test_a_number_that_was_given_is_kept():
    assert devices_of(4, XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3
    assert devices_of(4, JAX_NUM_CPU_DEVICES="1") == 1


def test_programs_that_run_once_are_compiled_quickly_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    compile_quickly()
    assert "--xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    compile_quickly()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here"
