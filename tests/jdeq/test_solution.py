from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jdeq
from jdeq.solution import Result, Solution


def test_every_code_has_advice_of_its_own():
    messages = [Result.message(code) for code in Result]
    assert len(set(messages)) == len(Result) == 5
    assert all(m.endswith(".") and "\n" not in m for m in messages)


def test_messages_take_entries_of_a_result():
    assert Result.message(jnp.array([3])[0]) == Result.message(Result.diverged)
    with pytest.raises(ValueError, match="7"):
        Result.message(7)


def test_a_solution_is_a_pytree_that_knows_what_converged():
    codes = jnp.array([0, 1, 2, 3, 4], jnp.int32)
    solution = Solution(value=jnp.zeros(5), result=codes, steps=codes, residual=jnp.zeros(5))
    assert solution.converged.tolist() == [True, False, False, False, False]
    doubled = jax.jit(lambda s: jax.tree.map(lambda v: 2 * v, s))(solution)
    assert isinstance(doubled, jdeq.Solution)
    assert doubled.steps.tolist() == [0, 2, 4, 6, 8]
    assert doubled.history is None
