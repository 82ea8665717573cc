"""What all tests share."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs after each module: XLA's CPU compiler crashes after a thousand."""
    yield
    jax.clear_caches()
