from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdeq import regularization
from tests.jdeq import problems


def estimate(params, x, z, key, probes):
    return regularization.jacobian_frobenius(problems.tanh_cell, params, z, x, key, probes=probes)


def test_estimates_the_frobenius_norm_of_each_problems_jacobian():
    p = problems.tanh()
    z = jnp.array(np.random.default_rng(0).normal(size=p.z0.shape))
    # At state z: J = diag(1 - f^2) W.
    f = problems.tanh_cell(p.params, z, p.x)
    J = (1 - f**2)[:, :, None] * p.params["W"]
    want = jnp.sum(J**2, (1, 2)) / problems.N
    got = jax.jit(estimate, static_argnums=4)(p.params, p.x, z, jax.random.key(0), 20000)
    np.testing.assert_allclose(got, want, rtol=0.05)
    assert got.shape == (problems.B,)


def test_one_probe_is_one_product_and_is_differentiable():
    p = problems.tanh()

    def penalty(params):
        return jnp.sum(estimate(params, p.x, p.z0, jax.random.key(1), 1))

    direction = jax.tree.map(jnp.ones_like, p.params)
    gradient = jax.jit(jax.grad(penalty))(p.params)
    got = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    compiled = jax.jit(penalty)
    want = problems.central_difference(
        lambda t: compiled(jax.tree.map(lambda v: v + t, p.params)), 1e-4
    )
    assert abs(got - want) <= 1e-7 * abs(want)


def test_states_of_several_leaves_and_data():
    p = problems.tree()

    got = regularization.jacobian_frobenius(
        lambda params, z, x, data: {
            "a": data[:, None] * z["a"],
            "b": (z["b"][0] * data[:, None, None].astype(jnp.float32),),
        },
        p.params,
        p.z0,
        p.x,
        jax.random.key(0),
        data=jnp.array([0.0, 1.0, 2.0]),
        probes=400,
    )
    np.testing.assert_allclose(got, [0.0, 1.0, 4.0], rtol=0.2)


def test_refuses_no_probes():
    p = problems.tanh()
    with pytest.raises(ValueError, match="jacobian_frobenius: probes=0 was given"):
        estimate(p.params, p.x, p.z0, jax.random.key(0), 0)
