"""What all tests share."""

from __future__ import annotations

import os

import jax
import pytest

# Most of the tests' time is XLA compiling small programs that run once, so they are compiled
# quickly rather than well; XLA_FLAGS from outside go first. Later versions lack the first flag and
# would abort on it.
os.environ.setdefault(
    "XLA_FLAGS",
    ("--xla_cpu_use_fusion_emitters=false " if jax.__version_info__ < (0, 11) else "")
    + "--xla_backend_optimization_level=0",
)

# Command lines that tests run in this process would otherwise make a device of every core, if they
# are the first to use jax.
jax.config.update("jax_num_cpu_devices", 1)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs after each module: XLA's CPU compiler crashes after a thousand."""
    yield
    jax.clear_caches()
