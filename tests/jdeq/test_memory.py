"""The memory of a gradient does not grow with the number of iterations behind it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jdeq
from tests.jdeq import problems


def temporary_bytes(loss, *arguments):
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def of_deq(steps):
    p = problems.tanh(batch=64)

    def loss(params):
        return jnp.sum(jdeq.deq(p.cell, params, p.x, p.z0, max_steps=steps).value)

    return temporary_bytes(loss, p.params)


def of_joint_solve(steps):
    o = problems.optimum()

    def loss(params):
        s = jdeq.joint_solve(o.problem, params, *o.arguments[2:], max_steps=steps)
        return jnp.sum(s.value.z)

    return temporary_bytes(loss, o.params)


def of_input_value(steps):
    o = problems.optimum()

    def loss(params):
        return jnp.sum(jdeq.input_value(o.problem, params, *o.arguments[2:], max_steps=steps)[0])

    return temporary_bytes(loss, o.params)


@pytest.mark.parametrize("measure", [of_deq, of_joint_solve, of_input_value])
def test_temporary_memory_at_20_and_at_200_steps(measure):
    short, long = measure(20), measure(200)
    assert short > 0
    assert long <= short


def test_a_history_does_grow():
    """Or the measurement above would see nothing."""
    p = problems.tanh(batch=64)

    def loss(params, steps):
        s = jdeq.deq(p.cell, params, p.x, p.z0, max_steps=steps, history=lambda z: z)
        return jnp.sum(s.value) + 0 * jnp.sum(s.history.record)

    sizes = [temporary_bytes(lambda q, n=n: loss(q, n), p.params) for n in (20, 200)]
    row = 8 * p.z0.size
    assert sizes[1] - sizes[0] > 100 * row
