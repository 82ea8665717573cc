"""The library is tested in float64, whatever other tests of the session set."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def double_precision():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
