"""A step budget is a limit that may be traced: schedules span it as they span the limit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.joint import Descent, JointMethod, Polished, best_of_starts
from tests.jdeq import problems

METHODS = {
    "descent": Descent(step_size=0.05),
    "polished": Polished(Descent(step_size=0.05), descent_share=0.3),
}
LIMIT, BUDGET = 80, 30


def agree(one, other):
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def solve(name, **options):
    o = problems.optimum()
    return jdeq.joint_solve(*o.arguments, method=METHODS[name], rtol=1e-12, **options)


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_solves_as_the_limit_does(name):
    want = solve(name, max_steps=BUDGET)
    agree(solve(name, max_steps=LIMIT, step_budget=BUDGET), want)
    agree(solve(name, max_steps=BUDGET, step_budget=LIMIT), want)


@pytest.mark.parametrize("name", METHODS)
def test_each_solve_of_a_vmap_has_its_own(name):
    budgets = jnp.array([7, BUDGET])
    together = jax.jit(jax.vmap(lambda budget: solve(name, max_steps=LIMIT, step_budget=budget)))(
        budgets
    )
    for i, budget in enumerate(budgets.tolist()):
        alone = solve(name, max_steps=LIMIT, step_budget=budget)
        agree(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone)


@pytest.mark.parametrize("name", METHODS)
def test_the_envelope_gradient_is_that_of_the_limit(name):
    o = problems.optimum()

    @functools.partial(jax.jit, static_argnames="limit")
    def gradient(params, limit, budget):
        def loss(params):
            values, _ = jdeq.input_value(
                o.problem, params, *o.arguments[2:], method=METHODS[name], rtol=1e-12,
                max_steps=limit, step_budget=budget,
            )  # fmt: skip
            return jnp.sum(values)

        return jax.grad(loss)(params)

    agree(gradient(o.params, LIMIT, BUDGET), gradient(o.params, BUDGET, None))


def test_best_of_starts_spans_it_too():
    o = problems.optimum()
    problem, params, target, x0, z0 = o.arguments
    starts = jnp.stack([x0, x0 + 1])

    def best(**options):
        return best_of_starts(
            problem, params, target, starts, z0, method=METHODS["descent"], rtol=1e-12, **options
        )

    agree(best(max_steps=LIMIT, step_budget=BUDGET), best(max_steps=BUDGET))


def test_an_optimiser_of_ones_own_keeps_its_schedule():
    own = Descent(optax.adam(optax.cosine_decay_schedule(0.05, LIMIT)))
    o = problems.optimum()

    def first(**options):
        s = jdeq.joint_solve(
            *o.arguments, method=own, rtol=1e-12, history=lambda state: state.x, **options
        )
        return s.history.record[: BUDGET - 1]

    agree(first(max_steps=LIMIT, step_budget=BUDGET), first(max_steps=LIMIT))


def test_the_schedule_is_optax_s_cosine():
    steps = 37
    own = Descent(step_size=0.3).transformation
    want = optax.adam(optax.cosine_decay_schedule(0.3, steps, 0.02), b1=0.5, b2=0.9, eps=1e-20)
    gradient = jnp.ones(2)
    for budget in (steps, jnp.int32(steps)):
        optimizer = own(budget)
        state, reference = optimizer.init(gradient), want.init(gradient)
        for _ in range(steps + 3):
            update, state = optimizer.update(gradient, state)
            expected, reference = want.update(gradient, reference)
            np.testing.assert_allclose(update, expected, rtol=1e-12)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.35, 1.0])
def test_the_polish_begins_where_it_does_with_the_limit(share):
    """At ties of the rounding, too: 0.15 times 190 is 28.5, but not in every precision."""
    method = Polished(descent_share=share)
    limits = np.arange(1, 1000)
    traced = jax.jit(method._switch)(jnp.asarray(limits))
    np.testing.assert_array_equal(traced, [method._switch(int(n)) for n in limits])


def test_methods_are_told_the_limit_in_force():
    class Told(Descent):
        def init(self, state, max_steps):
            told.append(max_steps)
            return super().init(state, max_steps)

        def step(self, state, evaluation, residual, memory, context):
            told.append(context.max_steps)
            return super().step(state, evaluation, residual, memory, context)

    told: list = []
    method = Told()
    assert isinstance(method, JointMethod)
    o = problems.optimum()
    jdeq.joint_solve(*o.arguments, method=method, max_steps=9)
    assert told
    assert all(limit == 9 for limit in told)
    told.clear()
    jdeq.joint_solve(*o.arguments, method=method, max_steps=9, step_budget=4)
    assert told
    assert all(isinstance(limit, jax.core.Tracer) for limit in told)
