from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.solvers import Reversible
from tests.jdeq import problems


def path(damping, steps):
    p = problems.tanh()
    s = jdeq.deq(
        p.cell, p.params, p.x, p.z0, solver=Reversible(damping), rtol=0.0, atol=0.0,
        max_steps=steps, history=lambda z: z,
    )  # fmt: skip
    return p, np.asarray(s.history.record)


def test_takes_the_steps_of_its_formula():
    p, a = path(0.7, 10)
    previous = np.asarray(p.z0)
    for k in range(9):
        want = 0.3 * previous + 0.7 * p.cell(p.params, a[k], p.x)
        np.testing.assert_allclose(a[k + 1], want, rtol=1e-12)
        previous = a[k]


def test_every_step_can_be_undone():
    p, a = path(0.5, 20)
    last, current = jnp.asarray(a[-1]), jnp.asarray(a[-2])
    for k in range(17, -1, -1):
        last, current = current, (last - 0.5 * p.cell(p.params, current, p.x)) / 0.5
        np.testing.assert_allclose(current, a[k], atol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 1.0, 1.5])
def test_damping_out_of_range_is_refused(damping):
    with pytest.raises(ValueError, match="Reversible: damping"):
        Reversible(damping)
