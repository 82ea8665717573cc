"""The difference quotient that outer gradients are compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.meta import gradient_error


def test_the_quotient_is_right_where_the_loss_changes_within_a_fortieth():
    with jax.enable_x64(True):
        direction = jnp.asarray([0.6, 0.8])
        slope = 40 * np.cos(40 * 0.5)
        quotient = gradient_error._quotient(
            lambda p: jnp.sin(40 * (p @ direction)), jnp.asarray([0.3, 0.4]), direction
        )
    assert quotient == pytest.approx(slope, rel=1e-6)
