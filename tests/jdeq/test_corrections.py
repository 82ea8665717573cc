"""Losses on the way to the equilibrium: the right iterates, the right gradients, no neighbours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.adjoints import Implicit, JacobianFree, Phantom
from jdeq.regularization import correction_iterates, correction_loss
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems


def picard_iterates(p, steps):
    z, rows = p.z0, [p.z0]
    for _ in range(steps):
        z = p.cell(p.params, z, p.x)
        rows.append(z)
    return rows


def test_iterates_are_those_of_the_solve():
    p = problems.tanh()
    got = correction_iterates(p.cell, p.params, p.x, p.z0, at=(0, 2, 5), solver=Picard())
    want = picard_iterates(p, 5)
    for z, step in zip(got, (0, 2, 5), strict=True):
        np.testing.assert_allclose(z, want[step], rtol=1e-12)
    anderson = jdeq.deq(p.cell, p.params, p.x, p.z0, max_steps=7, history=lambda z: z, rtol=1e-9)
    got = correction_iterates(p.cell, p.params, p.x, p.z0, at=(6,), solver=Anderson(), rtol=1e-9)
    np.testing.assert_allclose(got[0], anderson.history.record[6], rtol=1e-9)


@pytest.mark.parametrize("adjoint", [None, Phantom(steps=3)])
def test_gradients_are_those_of_a_few_steps_at_the_iterate(adjoint):
    p = problems.tanh()

    def loss(z):
        return jnp.sum(jnp.sin(z) * jnp.arange(1.0, problems.N + 1), axis=1)

    def total(params, x):
        early = correction_iterates(
            p.cell, params, x, p.z0, at=(1, 3), solver=Picard(), adjoint=adjoint
        )
        return jnp.sum(correction_loss(loss, early, discount=0.5))

    rows = picard_iterates(p, 3)

    def by_hand(params, x):
        # A loss with the right cotangent: the pull-backs of adjoints have their own tests.
        rule = adjoint or JacobianFree()
        out = 0.0
        for weight, z in ((0.25, rows[1]), (0.5, rows[3])):
            v = weight * jax.grad(lambda z: jnp.sum(loss(z)))(z)
            _, vjp = jax.vjp(lambda params, x, z: p.cell(params, z, x), params, x, z)
            u = v
            if isinstance(rule, Phantom):
                for _ in range(rule.steps - 1):
                    u = v + (1 - rule.damping) * u + rule.damping * vjp(u)[2]
                u = rule.damping * u
            grads = vjp(u)[:2]
            out = jax.tree.map(jnp.add, out, grads) if out else grads
        return out

    got = jax.jit(jax.grad(total, (0, 1)))(p.params, p.x)
    want = by_hand(p.params, p.x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)


def test_what_ends_before_keeps_its_last_iterate_and_harms_nobody():
    """A problem that converges at once, one that takes long, one that overflows, one of NaN."""
    p = problems.conditioned((0.0, 0.9, 1e80, 0.5))

    def early(x):
        options = {"at": (2, 9), "solver": Picard(), "rtol": 1e-9}
        return correction_iterates(p.cell, p.params, x, p.z0, **options)

    x = {**p.x, "rate": p.x["rate"].at[3].set(jnp.nan)}
    got = jax.jit(early)(x)
    for z in got:
        np.testing.assert_allclose(z[0], p.answer[0], rtol=1e-9)
        assert np.all(np.isfinite(z))
    powers = [(1 - 0.9**k) / (1 - 0.9) for k in (2, 9)]
    for z, power in zip(got, powers, strict=True):
        np.testing.assert_allclose(z[1], power * p.x["shift"][1], rtol=1e-9)
    bars = jax.jit(jax.grad(lambda x: sum(jnp.sum(z) for z in early(x))))(x)
    np.testing.assert_allclose(bars["shift"][:2], 2.0)
    np.testing.assert_array_equal(bars["shift"][3], 0.0)
    assert all(np.all(np.isfinite(b)) for b in jax.tree.leaves(bars))


def test_trees_data_and_vmap():
    p = problems.tree()

    def cell(params, z, x, data):
        total = problems.tree_cell(params, z, x)
        return {**total, "a": total["a"] * data[:, None]}

    def early(data):
        return correction_iterates(cell, p.params, p.x, p.z0, data=data, at=[1, 3], solver=Picard())

    data = jnp.array([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    batched = jax.jit(jax.vmap(early))(data)
    alone = jax.jit(early)(data[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5), batched, alone)
    # The last rows have the scale one, so that they are the iterates of the cell without it.
    want = picard_iterates(p, 3)
    for z, step in zip(batched, (1, 3), strict=True):
        np.testing.assert_allclose(z["a"][1], want[step]["a"], rtol=1e-5)


def test_the_loss_is_weighted_towards_the_end():
    iterates = [jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0])]
    got = correction_loss(lambda z: z, iterates, discount=0.5)
    np.testing.assert_allclose(got, [0.25 + 5, 0.5 + 10])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"at": ()}, ValueError, r"at=\(\) was given"),
        ({"at": 3}, ValueError, "at=3 was given"),
        ({"at": (3, -1)}, ValueError, "an entry of at=-1 was given"),
        ({"at": (3,), "adjoint": Implicit()}, TypeError, "others? gradients assume"),
        ({"at": (3,), "data": jnp.zeros(7)}, ValueError, "data has shape"),
    ],
)
def test_refusals(options, error, message):
    p = problems.tanh()
    with pytest.raises(error, match=message):
        correction_iterates(p.cell, p.params, p.x, p.z0, **options)


def test_refusals_of_the_loss():
    with pytest.raises(ValueError, match=r"discount=0\.0 was given"):
        correction_loss(jnp.sum, [jnp.ones(2)], discount=0.0)
    with pytest.raises(ValueError, match="no iterates were given"):
        correction_loss(jnp.sum, [])


class Thrown:
    """Picard's iteration, but for one step that leads far away."""

    def init(self, z):
        return ()

    def step(self, z, fz, memory, k):
        return jnp.where(k == 6, 1e9, fz), memory


def test_an_iterate_far_from_the_solution_that_was_found_is_not_taken():
    """The solve has `stagnated`, at the rounding floor, not `diverged`."""
    x = jnp.array([[1.0, 2.0]])

    def cell(params, z, x):
        return 0.01 * z + x

    options = {"solver": Thrown(), "rtol": 0.0, "atol": 0.0}
    solution = jdeq.deq(cell, None, x, 0 * x, max_steps=12, **options)
    assert solution.result.tolist() == [Result.stagnated]
    early, late = correction_iterates(cell, None, x, 0 * x, at=(2, 9), **options)
    np.testing.assert_allclose(early, 1.01 * x, rtol=1e-12)
    np.testing.assert_allclose(late, x / 0.99, rtol=1e-10)
