"""What all tests share."""

from __future__ import annotations

import os

import jax
import pytest

from experiments.common.devices import compile_quickly

# Most of the tests' time is XLA compiling small programs that run once.
compile_quickly()

# Command lines would otherwise make a device of every core, in this process if they are the first
# to use jax, and in those that tests start: what is compared to the bit needs as many devices.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs after each module: XLA's CPU compiler crashes after a thousand."""
    yield
    jax.clear_caches()
