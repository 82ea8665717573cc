"""What all tests share."""

from __future__ import annotations

import jax
import pytest

from experiments.common.devices import compile_quickly

# Most of the tests' time is XLA compiling small programs that run once.
compile_quickly()

# Command lines that tests run in this process would otherwise make a device of every core, if they
# are the first to use jax.
jax.config.update("jax_num_cpu_devices", 1)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs after each module: XLA's CPU compiler crashes after a thousand."""
    yield
    jax.clear_caches()
