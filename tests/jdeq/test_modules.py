"""One's own layer as a cell: plain function, Flax Linen, Equinox and Flax NNX give the same."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Picard
from tests.jdeq import problems

N, M = problems.N, problems.M


class LinenCell(linen.Module):
    @linen.compact
    def __call__(self, z, x):
        dense = {"use_bias": False, "param_dtype": jnp.float64}
        return jnp.tanh(linen.Dense(N, name="W", **dense)(z) + linen.Dense(N, name="U", **dense)(x))


class EquinoxCell(eqx.Module):
    W: eqx.nn.Linear
    U: eqx.nn.Linear
    activation: callable  # a leaf that is no array

    def __call__(self, z, x):
        return self.activation(jax.vmap(self.W)(z) + jax.vmap(self.U)(x))


class NnxCell(nnx.Module):
    def __init__(self, rngs):
        dense = {"use_bias": False, "param_dtype": jnp.float64, "rngs": rngs}
        self.W, self.U = nnx.Linear(N, N, **dense), nnx.Linear(M, N, **dense)

    def __call__(self, z, x):
        return jnp.tanh(self.W(z) + self.U(x))


def plain(W, U):
    """``cell``, ``params`` and how to read ``(W, U)`` out of a tree like ``params``."""
    cell = lambda params, z, x: jnp.tanh(z @ params["W"].T + x @ params["U"].T)  # noqa: E731
    return cell, {"W": W, "U": U}, lambda tree: (tree["W"], tree["U"])


def from_linen(W, U):
    module = LinenCell()
    params = {"params": {"W": {"kernel": W.T}, "U": {"kernel": U.T}}}
    read = lambda tree: tuple(tree["params"][k]["kernel"].T for k in "WU")  # noqa: E731
    return module.apply, params, read


def from_equinox(W, U):
    key = jax.random.key(0)
    dense = {"use_bias": False, "key": key}
    module = EquinoxCell(eqx.nn.Linear(N, N, **dense), eqx.nn.Linear(M, N, **dense), jnp.tanh)
    module = eqx.tree_at(lambda m: (m.W.weight, m.U.weight), module, (W, U))
    params, static = eqx.partition(module, eqx.is_array)

    def cell(params, z, x):
        return eqx.combine(params, static)(z, x)

    return cell, params, lambda tree: (tree.W.weight, tree.U.weight)


def from_nnx(W, U):
    module = NnxCell(nnx.Rngs(0))
    module.W.kernel[...], module.U.kernel[...] = W.T, U.T
    graph, params = nnx.split(module)

    def cell(params, z, x):
        return nnx.merge(graph, params)(z, x)

    return cell, params, lambda tree: (tree["W"]["kernel"][...].T, tree["U"]["kernel"][...].T)


KINDS = {"plain": plain, "linen": from_linen, "equinox": from_equinox, "nnx": from_nnx}


def objective(params, z, x, target):
    return jnp.sum((z - target) ** 2, 1) + 0.1 * jnp.sum(x**2, 1)


def results(kind):
    """Values and gradients of the three entry points for one kind of cell."""
    rng = np.random.default_rng(0)
    W = jnp.array(problems.matrix(rng, N, N, 0.6))
    U = jnp.array(problems.matrix(rng, N, M, 1.0))
    x, target = jnp.array(rng.normal(size=(3, M))), jnp.array(0.3 * rng.normal(size=(3, N)))
    x0, z0 = jnp.zeros((3, M)), jnp.zeros((3, N))
    cell, params, read = KINDS[kind](W, U)
    problem = jdeq.InputProblem(cell, objective)

    @jax.jit
    def run(params):
        def of_deq(params, x):
            s = jdeq.deq(cell, params, x, z0, solver=Picard(), rtol=1e-12, max_steps=500)
            return jnp.sum(jnp.sin(s.value)), s.value

        def of_joint(params):
            method = jdeq.joint.Descent(optax.sgd(0.05))
            solve = {"method": method, "rtol": 1e-10, "max_steps": 2000}
            s = jdeq.joint_solve(problem, params, target, x0, z0, **solve)
            return jnp.sum(jnp.sin(s.value.z)), (s.value.x, s.result)

        def of_value(params):
            return jnp.sum(jdeq.input_value(problem, params, target, x0, z0, rtol=1e-8)[0])

        return (
            jax.value_and_grad(of_deq, (0, 1), has_aux=True)(params, x),
            jax.value_and_grad(of_joint, has_aux=True)(params),
            jax.value_and_grad(of_value)(params),
        )

    deq, joint, value = run(params)
    (_, z), (params_bar, x_bar) = deq
    (_, (x, result)), joint_bar = joint
    assert np.all(result == Result.converged)
    for bar in (params_bar, joint_bar, value[1]):
        assert jax.tree.structure(bar) == jax.tree.structure(params)
    return z, read(params_bar), x_bar, x, read(joint_bar), value[0], read(value[1])


@pytest.fixture(scope="module")
def reference():
    return results("plain")


@pytest.mark.parametrize("kind", ["linen", "equinox", "nnx"])
def test_modules_give_the_values_and_gradients_of_a_plain_function(reference, kind):
    got = results(kind)
    assert len(jax.tree.leaves(got)) == 10
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
        assert np.any(b != 0)


def test_a_module_with_other_leaves_than_arrays_is_refused_with_advice():
    dense = {"use_bias": False, "key": jax.random.key(0)}
    module = EquinoxCell(eqx.nn.Linear(N, N, **dense), eqx.nn.Linear(M, N, **dense), jnp.tanh)
    x, z0 = jnp.zeros((3, M)), jnp.zeros((3, N))
    with pytest.raises(TypeError, match=r"params\.activation is a .* equinox.partition"):
        jdeq.deq(lambda module, z, x: module(z, x), module, x, z0)
    with pytest.raises(TypeError, match=r"cell is a EquinoxCell, which cannot be hashed"):
        jdeq.deq(module, None, x, z0)


def test_a_captured_nnx_module_without_randomness_is_a_closure():
    model = NnxCell(nnx.Rngs(0))
    x, z0 = jnp.ones((3, M)), jnp.zeros((3, N))
    options = {"solver": Picard(damping=0.5), "rtol": 1e-10, "max_steps": 500}

    def captured(model):
        return jnp.sum(jdeq.deq(lambda _, z, x: model(z, x), None, x, z0, **options).value)

    graph, params = nnx.split(model)

    def explicit(params):
        cell = lambda params, z, x: nnx.merge(graph, params)(z, x)  # noqa: E731
        return jnp.sum(jdeq.deq(cell, params, x, z0, **options).value)

    got = nnx.grad(captured)(model)
    want = jax.grad(explicit)(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_dropout_masks_go_through_data():
    """The advice that a module with a random stream is refused with, followed."""
    model = NnxCell(nnx.Rngs(0))
    graph, params = nnx.split(model)

    def cell(params, z, x, masks):
        return nnx.merge(graph, params)(z * masks, x)

    masks = jax.random.bernoulli(jax.random.key(0), 0.5, (3, N)) * 2.0
    x, z0 = jnp.ones((3, M)), jnp.zeros((3, N))
    s = jdeq.deq(
        cell, params, x, z0, data=masks, solver=Picard(0.5), rtol=1e-9, atol=0.0, max_steps=500
    )
    assert np.all(s.result == Result.converged)
    np.testing.assert_allclose(cell(params, s.value, x, masks), s.value, atol=1e-7)
