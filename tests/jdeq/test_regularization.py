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


def test_with_a_key_each_problems_estimate_does_not_depend_on_the_others():
    p = problems.tanh()
    z = jnp.array(np.random.default_rng(0).normal(size=p.z0.shape))
    keys = jax.random.split(jax.random.key(2), problems.B)
    together = estimate(p.params, p.x, z, keys, 3)
    rest = estimate(p.params, p.x[1:], z[1:], keys[1:], 3)
    np.testing.assert_allclose(together[1:], rest, rtol=1e-12)
    assert len(set(np.asarray(together / rest[0]).round(6).tolist())) == problems.B
    f = problems.tanh_cell(p.params, z, p.x)
    want = jnp.sum(((1 - f**2)[:, :, None] * p.params["W"]) ** 2, (1, 2)) / problems.N
    got = jax.jit(estimate, static_argnums=4)(p.params, p.x, z, keys, 20000)
    np.testing.assert_allclose(got, want, rtol=0.05)


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


def rotations(radius, angle, rest=0.5, n=6):
    """Per problem, a Jacobian with the eigenvalues ``radius exp(+-i angle)`` above others."""
    rng = np.random.default_rng(0)
    matrices = []
    for r, a in zip(radius, angle, strict=True):
        block = np.zeros((n, n))
        block[:2, :2] = r * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        block[2:, 2:] = np.diag(rest * r * rng.uniform(-1, 1, n - 2))
        basis = rng.normal(size=(n, n))
        matrices.append(basis @ block @ np.linalg.inv(basis))
    return jnp.array(matrices)


def matrix_cell(params, z, x):
    return jnp.einsum("bij,bj->bi", x, z) + 0 * params


def radius_of(x, steps=100, key=0):
    z = jnp.ones(x.shape[:2], x.dtype)
    key = jax.random.key(key)
    return regularization.spectral_radius(matrix_cell, jnp.ones(()), z, x, key, steps=steps)


@pytest.mark.parametrize("key", [0, 1, 2])
def test_spectral_radius_of_complex_pairs_in_a_skewed_basis(key):
    want = np.array([0.3, 0.95, 2.0, 40.0])
    x = rotations(want, [0.3, 1.0, 2.5, np.pi / 3])
    np.testing.assert_allclose(jax.jit(radius_of)(x, key=key), want, rtol=3e-3)


def test_spectral_radius_of_real_pairs_of_either_sign_and_of_none():
    x = jnp.stack([jnp.diag(jnp.array(d)) for d in ([0.9, -0.9, 0.1], [1.5, 0.2, -1.0])])
    radius = jax.jit(radius_of, static_argnames="steps")
    np.testing.assert_allclose(radius(x), [0.9, 1.5], rtol=1e-6)
    nilpotent = jnp.array([[[0.0, 3.0, 1.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]])
    np.testing.assert_array_equal(radius(nilpotent, steps=6), [0.0])
    np.testing.assert_array_equal(radius(jnp.zeros((1, 3, 3))), [0.0])


@pytest.mark.parametrize("n", [5, 50])
def test_spectral_radius_is_as_accurate_as_documented(n):
    x = jnp.array(np.random.default_rng(n).normal(size=(200, n, n)))
    want = np.abs(np.linalg.eigvals(x)).max(1)
    for steps, error in ((100, 0.02), (400, 0.002)):
        got = jax.jit(radius_of, static_argnames="steps")(x, steps=steps)
        assert np.quantile(np.abs(got / want - 1), 0.95) < error


def test_spectral_radius_of_a_cell_under_vmap_and_with_a_bad_neighbour():
    p = problems.tanh()
    f = problems.tanh_cell(p.params, p.answer, p.x)
    J = (1 - f**2)[:, :, None] * p.params["W"]
    want = np.abs(np.linalg.eigvals(J)).max(1)

    def radius(x, key):
        return regularization.spectral_radius(
            problems.tanh_cell, p.params, jnp.asarray(p.answer), x, key, steps=400
        )

    keys = jax.random.split(jax.random.key(0), 2)
    bad = p.x.at[0].set(jnp.nan)
    got = jax.jit(jax.vmap(radius))(jnp.stack([p.x, bad]), keys)
    np.testing.assert_allclose(got[0], want, rtol=1e-4)
    np.testing.assert_allclose(got[1, 1:], want[1:], rtol=1e-4)


def on_trajectory(params, x, z0, key, **options):
    return regularization.trajectory_frobenius(problems.tanh_cell, params, x, z0, key, **options)


def test_the_penalty_is_taken_at_the_iterates_of_the_range():
    """With as many probes as needed, it is that of one of them, and each of them occurs."""
    p = problems.tanh(batch=1)
    batch = 64
    x, z0 = jnp.tile(p.x, (batch, 1)), jnp.zeros((batch, problems.N))
    options = {"steps": (2, 5), "damping": 0.7, "probes": 4000}
    got = jax.jit(lambda key: on_trajectory(p.params, x, z0, key, **options))(jax.random.key(0))
    z, norms = p.z0, []
    for _ in range(6):
        f = problems.tanh_cell(p.params, z, p.x)
        norms.append(float(jnp.sum(((1 - f**2)[:, :, None] * p.params["W"]) ** 2)) / problems.N)
        z = z + 0.7 * (f - z)
    distance = np.abs(np.asarray(got)[:, None] / np.array(norms[2:]) - 1)
    assert np.all(distance.min(1) < 0.1)
    assert set(distance.argmin(1)) == {0, 1, 2, 3}


def test_its_gradient_holds_the_iterate_constant_also_for_a_closure():
    p = problems.tanh()
    key = jax.random.key(3)
    z = p.z0
    for _ in range(4):
        z = problems.tanh_cell(p.params, z, p.x)

    def penalty(params):
        return jnp.sum(on_trajectory(params, p.x, p.z0, key, steps=(4, 4)))

    def at_the_iterate(params):
        probe_key = jax.random.split(key)[1]
        return jnp.sum(
            regularization.jacobian_frobenius(problems.tanh_cell, params, z, p.x, probe_key)
        )

    def captured(params):
        cell = lambda _, z, x: problems.tanh_cell(params, z, x)  # noqa: E731
        return jnp.sum(
            regularization.trajectory_frobenius(cell, None, p.x, p.z0, key, steps=(4, 4))
        )

    want = jax.jit(jax.grad(at_the_iterate))(p.params)
    for function in (penalty, captured):
        got = jax.jit(jax.grad(function))(p.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, want)


def test_failing_problems_contribute_nothing_to_the_penalty():
    p = problems.conditioned((0.1, 0.5, 0.9))
    key = jax.random.key(0)

    def cell(params, z, x):
        return jnp.tanh(params) * x["rate"] * z**3 / (1 + z**2) + x["shift"]

    def penalty(params, x):
        options = {"steps": (15, 20)}
        each = regularization.trajectory_frobenius(cell, params, x, p.z0, key, **options)
        return jnp.sum(each[1:]), each

    penalise = jax.jit(jax.value_and_grad(penalty, (0, 1), has_aux=True))
    want = penalise(jnp.ones(()), p.x)
    for rate in (jnp.nan, 1e3):
        x = {**p.x, "rate": p.x["rate"].at[0].set(rate)}
        got = penalise(jnp.ones(()), x)
        assert got[0][1][0] == 0
        np.testing.assert_allclose(got[0][1][1:], want[0][1][1:], rtol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got[1], want[1])


def test_trajectories_of_trees_data_and_vmap():
    p = problems.tree()

    def cell(params, z, x, data):
        total = problems.tree_cell(params, z, x)
        return {**total, "a": total["a"] * data[:, None]}

    def penalty(data):
        key = jax.random.key(0)
        return regularization.trajectory_frobenius(
            cell, p.params, p.x, p.z0, key, data=data, steps=(0, 3)
        )

    data = jnp.array([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    batched, alone = jax.jit(jax.vmap(penalty))(data), jax.jit(penalty)
    np.testing.assert_allclose(batched, jnp.stack([alone(d) for d in data]), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, r"steps=5 was given, but a pair"),
        ({"steps": (3, 2)}, r"steps\[1\]=2 was given, .* at least 3"),
        ({"steps": (-1, 2)}, r"steps\[0\]=-1 was given"),
        ({"damping": 0.0}, "damping=0.0 was given"),
        ({"probes": 0}, "probes=0 was given"),
    ],
)
def test_bad_trajectory_options_are_refused(options, message):
    p = problems.tanh()
    with pytest.raises(ValueError, match=message):
        on_trajectory(p.params, p.x, p.z0, jax.random.key(0), **options)


def test_too_few_steps_of_power_iteration_are_refused():
    with pytest.raises(ValueError, match="spectral_radius: steps=1 was given"):
        radius_of(jnp.zeros((1, 3, 3)), steps=1)
