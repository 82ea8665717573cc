"""Batches spread over a mesh with explicit axes: values and gradients are those without it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdeq
from tests.jdeq.test_shard_map import MEASURES, METHODS, SOLVES, cell, objective, problem

ROWS = PartitionSpec("batch")


def spread(params, x):
    """On all devices: one, unless JAX_NUM_CPU_DEVICES says otherwise."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), (AxisType.Explicit,))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return params, jax.device_put(x, NamedSharding(mesh, ROWS))


def four_problems():
    params, x = problem()
    return params, jnp.concatenate([x, x[:1] / 2])


def check(function, rtol=1e-12):
    """Compares what the function makes of the problems, and of the same on the mesh."""
    given = four_problems()
    expected, got = jax.jit(function)(*given), jax.jit(function)(*spread(*given))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-12), got, expected)
    return got


@pytest.mark.parametrize("name", SOLVES)
def test_equilibrium(name):
    def loss(params, x):
        solution = jdeq.deq(cell, params, x, jnp.zeros_like(x), rtol=1e-10, atol=0, **SOLVES[name])
        return jnp.sum(jnp.sin(solution.value)), solution

    # Products round differently in parts of the batch. These two amplify that: SHINE's estimate is
    # made of differences of residuals of 1e-10, of which rounding leaves six digits, and the
    # reversible gradient runs an iteration backwards.
    rtol = {"Shine": 1e-5, "Reversible": 1e-7}.get(name, 1e-12)
    _, solution = check(jax.grad(loss, (0, 1), has_aux=True), rtol)
    for leaf in (solution.value, solution.residual, solution.steps):
        assert jax.typeof(leaf).sharding.spec[0] == "batch"


def test_history_memory_fold_and_aux():
    def solve(params, x):
        z0 = jnp.zeros_like(x)
        return jdeq.deq(
            lambda *given: (cell(*given), jnp.sum(given[1], 1)), params, x, z0, has_aux=True,
            fold=jdeq.Fold(lambda total, z, k: total + z, z0), history=lambda z: z,
            memory=jdeq.solvers.Anderson().init(z0), max_steps=9,
        )  # fmt: skip

    solution = check(solve)
    assert jax.typeof(solution.history.residual).sharding.spec == PartitionSpec(None, "batch")
    assert solution.history.record.shape == (9, 4, 5)


INPUTS = jdeq.InputProblem(cell, objective, partial(jdeq.projections.l2_ball, radius=0.5))


@pytest.mark.parametrize("name", METHODS)
def test_joint(name):
    def loss(params, target):
        zeros = jnp.zeros_like(target)
        found = METHODS[name](INPUTS, params, 0.3 * target, zeros, zeros)
        return jnp.sum(jnp.sin(found.value.z) + found.value.x**2), found.value

    _, value = check(jax.grad(loss, (0, 1), has_aux=True), 1e-9)
    assert jax.typeof(value.x).sharding.spec[0] == "batch"


def test_what_a_function_captures_is_to_be_passed():
    params, x = spread(*four_problems())
    with pytest.raises(ValueError, match="deq: cell captures an array that lies on a mesh"):
        jdeq.deq(lambda p, z, x: cell(params, z, x), None, x, jnp.zeros_like(x))
    with pytest.raises(ValueError, match="fixed_point: f captures an array that lies on a mesh"):
        jdeq.fixed_point(lambda p, z: cell(p, z, x), params, jnp.zeros(x.shape))


def test_starts_that_are_spread():
    def solve(params, x0):
        zeros = jnp.zeros((1, 5))
        return jdeq.joint.best_of_starts(INPUTS, params, zeros, x0[:, None], zeros)

    assert check(solve, 1e-6).aux.objectives.shape == (4, 1)


def test_value_of_the_joint_problem():
    def loss(params, target):
        zeros = jnp.zeros_like(target)
        return jnp.sum(jdeq.input_value(INPUTS, params, target, zeros, zeros)[0])

    check(jax.grad(loss, (0, 1)), 1e-9)


def test_diagnosis():
    def diagnose(params, target):
        zeros = jnp.zeros_like(target)
        return jdeq.diagnose(INPUTS, params, 0.3 * target, zeros, zeros, max_steps=300)

    check(diagnose, 1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_regularization(name):
    def loss(params, x):
        return jnp.sum(MEASURES[name](cell, params, jnp.tanh(x), x, jax.random.key(0)))

    check(jax.grad(loss))
