"""Solves inside ``jax.shard_map`` with its checks: values and gradients are those outside."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import jdeq
from jdeq import adjoints, solvers


def cell(params, z, x):
    return jnp.tanh(z @ params["w"] + x)


def on_shards(loss):
    """The loss as the sum of what every device makes of its part of the second argument."""
    mesh = Mesh(jax.devices()[:1], ("batch",))
    return jax.shard_map(
        lambda params, x: jax.lax.psum(loss(params, x), "batch"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("batch")),
        out_specs=PartitionSpec(),
    )


def problem():
    keys = jax.random.split(jax.random.key(0), 2)
    w = jax.random.normal(keys[0], (5, 5))
    params = {"w": 0.6 * w / jnp.linalg.norm(w, 2)}
    return params, jax.random.normal(keys[1], (3, 5))


SOLVES = {
    "Picard": {"solver": solvers.Picard()},
    "Anderson": {},
    "Broyden": {"solver": solvers.Broyden()},
    "NewtonKrylov": {"solver": solvers.NewtonKrylov()},
    "GMRES": {"adjoint": adjoints.Implicit(solvers.GMRES())},
    "BiCGStab": {"adjoint": adjoints.Implicit(solvers.BiCGStab())},
    "ImplicitForward": {"adjoint": adjoints.ImplicitForward()},
    "Unrolled": {"adjoint": adjoints.Unrolled()},
    "Phantom": {"adjoint": adjoints.Phantom()},
    "JacobianFree": {"adjoint": adjoints.JacobianFree()},
    "Shine": {"adjoint": adjoints.Shine()},
    "Reversible": {"solver": solvers.Reversible(0.8), "adjoint": adjoints.Reversible()},
    "compaction": {"compaction": 1},
}


@pytest.mark.parametrize("name", SOLVES)
def test_equilibrium(name):
    params, x = problem()

    def loss(params, x):
        z = jdeq.deq(cell, params, x, jnp.zeros_like(x), rtol=1e-10, atol=0, **SOLVES[name]).value
        return jnp.sum(jnp.sin(z))

    expected = jax.value_and_grad(loss, (0, 1))(params, x)
    got = jax.value_and_grad(on_shards(loss), (0, 1))(params, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, expected)


def objective(params, z, x, target):
    return jnp.sum((z - target) ** 2, 1) + 0.1 * jnp.sum(x**2, 1)


METHODS = {
    "descent": partial(jdeq.joint_solve, method=jdeq.joint.Descent(optax.adam(0.05))),
    "polished": jdeq.joint_solve,
    "nested": partial(jdeq.nested_solve, optimizer=optax.adam(0.05)),
    "KKT": partial(jdeq.joint_solve, adjoint=adjoints.KKTImplicit(), max_steps=300),
    "starts": lambda inputs, params, target, x0, z0: jdeq.joint.best_of_starts(
        inputs, params, target, jnp.stack([x0, x0 + 1]), z0
    ),
}


def test_value_of_the_joint_problem():
    params, target = problem()
    inputs = jdeq.InputProblem(cell, objective)

    def loss(params, target):
        zeros = jnp.zeros_like(target)
        return jnp.sum(jdeq.input_value(inputs, params, target, zeros, zeros)[0])

    expected = jax.value_and_grad(loss, (0, 1))(params, target)
    got = jax.value_and_grad(on_shards(loss), (0, 1))(params, target)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), got, expected)


@pytest.mark.parametrize("name", METHODS)
def test_joint(name):
    params, target = problem()
    inputs = jdeq.InputProblem(cell, objective, partial(jdeq.projections.l2_ball, radius=0.5))

    def loss(params, target):
        zeros = jnp.zeros_like(target)
        found = METHODS[name](inputs, params, 0.3 * target, zeros, zeros).value
        return jnp.sum(jnp.sin(found.z) + found.x**2)

    expected = jax.value_and_grad(loss, (0, 1))(params, target)
    got = jax.value_and_grad(on_shards(loss), (0, 1))(params, target)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), got, expected)


def test_diagnosis():
    params, target = problem()
    inputs = jdeq.InputProblem(cell, objective)

    def radii(params, target):
        zeros = jnp.zeros_like(target)
        found = jdeq.diagnose(inputs, params, target, zeros, zeros, max_steps=300)
        return jnp.sum(found.augmented_radius + found.state_radius + found.hessian_largest)

    np.testing.assert_allclose(
        jax.jit(on_shards(radii))(params, target), radii(params, target), rtol=1e-6
    )


MEASURES = {
    "jacobian": jdeq.regularization.jacobian_frobenius,
    "trajectory": partial(jdeq.regularization.trajectory_frobenius, steps=(1, 4)),
    "radius": partial(jdeq.regularization.spectral_radius, steps=4),
}


@pytest.mark.parametrize("name", MEASURES)
def test_regularization(name):
    """Regression: random vectors did not vary over devices as the state does, which JAX refuses."""

    def loss(params, x):
        return jnp.sum(MEASURES[name](cell, params, jnp.tanh(x), x, jax.random.key(0)))

    params, x = problem()
    expected = jax.value_and_grad(loss)(params, x)
    got = jax.jit(jax.value_and_grad(on_shards(loss)))(params, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, expected)
