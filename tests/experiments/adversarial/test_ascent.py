"""Steps on perturbations: their directions, their momentum, and the wait before the first."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.adversarial.ascent import ascent, steepest

_ROUNDING = 1e-6  # some units in the last place of float32, and of sums of a few steps in it


def walk(optimizer, gradient, u, steps):
    """The inputs that an optimiser passes through."""
    memory, passed = optimizer.init(u), [u]
    for _ in range(steps):
        step, memory = optimizer.update(gradient(u), memory, u)
        u = u + step
        passed.append(u)
    return np.array(passed)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_directions_have_length_one_whatever_the_gradient_has(scale):
    gradient = scale * jnp.array([3.0, -4.0, 0.0])
    for norm, expected in (("l2", [0.6, -0.8, 0.0]), ("linf", [1.0, -1.0, 0.0])):
        np.testing.assert_allclose(steepest(gradient, norm), expected, rtol=_ROUNDING)
        np.testing.assert_array_equal(steepest(0 * gradient, norm), 0)


def test_momentum_carries_the_difference_of_the_points():
    """Along a constant gradient v_k = u_k + rate, u_{k+1} = v_k + m (v_k - v_{k-1})."""
    rate, momentum = 0.5, 0.4
    passed = walk(ascent("l2", rate, momentum=momentum), lambda u: -jnp.ones(1), jnp.zeros(1), 6)
    expected, last = [0.0], None
    for _ in range(6):
        point = expected[-1] + rate
        expected.append(point + (0.0 if last is None else momentum * (point - last)))
        last = point
    np.testing.assert_allclose(passed[:, 0], expected, rtol=_ROUNDING)


def test_the_input_waits_and_then_walks_as_without_a_wait():
    def gradient(u):
        return jnp.array([4.0, 1.0]) * u - 1.0

    start = jnp.array([2.0, -1.0])
    at_once = walk(ascent("l2", 0.3, momentum=0.7), gradient, start, 5)
    later = walk(ascent("l2", 0.3, momentum=0.7, hold=3), gradient, start, 8)
    np.testing.assert_array_equal(later[:4], np.tile(start, (4, 1)))
    np.testing.assert_allclose(later[3:], at_once, rtol=_ROUNDING)


def test_the_rate_falls_to_a_tenth():
    passed = walk(ascent("l2", 1.0, decay_steps=10), lambda u: -jnp.ones(1), jnp.zeros(1), 14)
    lengths = np.diff(passed[:, 0])
    # Differences of points of size five: their rounding is a few units of 5e-7, beside 0.1.
    np.testing.assert_allclose(lengths[[0, 5, 10, 13]], [1.0, 0.55, 0.1, 0.1], rtol=1e-5)


def test_one_object_for_each_set_of_arguments():
    assert ascent("l2", 1.0, momentum=0.5) is ascent("l2", 1.0, momentum=0.5)
    assert ascent("l2", 1.0, momentum=0.5) is not ascent("l2", 1.0)
