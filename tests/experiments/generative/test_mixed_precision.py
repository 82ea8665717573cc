"""States in bfloat16: what is narrow, what stays float32, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jdeq
from experiments.generative.config import PRESETS
from experiments.generative.inference import solve
from experiments.generative.problem import build_generator
from experiments.generative.train import initial_state, step_of, training_loss
from jdeq import Result

SHAPE = (8, 8, 1)
BATCH, HIDDEN, LATENT = 6, 48, 5
EPS = float(jnp.finfo(jnp.bfloat16).eps)
DENSE = replace(
    PRESETS["smoke"], hidden=HIDDEN, decoder_hidden=32, latent_dim=LATENT, inner_steps=30
)
MULTISCALE = replace(
    DENSE, generator="multiscale", channels=(8, 16), jacobian_weight=1.0, inner_steps=4
)


def narrow(config):
    return replace(config, state_dtype="bfloat16")


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).random((BATCH, *SHAPE), np.float32))


def gradient(config, images):
    """The initial parameters, the gradient of the training loss there, metrics and solution."""
    generator, params = build_generator(config, SHAPE, seed=0)
    x0, _ = generator.start(params, len(images))
    keys = jax.random.split(jax.random.key(1), len(images))
    grad, measured = jax.grad(training_loss, has_aux=True)(
        params, generator, config, images, keys, x0
    )
    return params, grad, measured.means | measured.medians, measured.found


@pytest.mark.parametrize("config", [DENSE, MULTISCALE], ids=["dense", "multiscale"])
def test_states_are_bfloat16_and_all_else_float32_through_a_training_step(config, images):
    config = narrow(config)
    generator, params = build_generator(config, SHAPE, seed=0)
    state = initial_state(config, params, seed=0)
    batch = {"image": images, "index": jnp.arange(BATCH)}
    stays = jax.eval_shape(step_of(config, generator), state, batch)
    floats = [leaf for leaf in jax.tree.leaves(stays) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    # A solve refuses a cell that changes the dtype of its state.
    _, z0 = generator.start(params, BATCH)
    assert {leaf.dtype for leaf in jax.tree.leaves(z0)} == {jnp.dtype("bfloat16")}


def equations(jaxpr):
    """All equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_the_solve_multiplies_in_bfloat16_and_carries_nothing_else_of_the_states_size(images):
    config = narrow(DENSE)
    program = jax.make_jaxpr(lambda images: gradient(config, images)[1])(images).jaxpr
    loops = [e for e in equations(program) if e.primitive.name == "while"]
    carried = [
        {v.aval.dtype for v in loop.outvars if v.aval.shape == (BATCH, HIDDEN)} for loop in loops
    ]
    assert {jnp.dtype("bfloat16")} in carried
    assert all(dtypes <= {jnp.dtype("bfloat16")} for dtypes in carried)
    inside = [e for loop in loops for e in equations(loop.params["body_jaxpr"].jaxpr)]
    recurrent = [
        {v.aval.dtype for v in e.invars}
        for e in inside
        if e.primitive.name == "dot_general"
        and (HIDDEN, HIDDEN) in {v.aval.shape for v in e.invars}
    ]
    # The cell, and its transpose for the adjoint.
    assert recurrent == [{jnp.dtype("bfloat16")}] * 2


def test_a_solve_converges_above_the_rounding_floor_and_stagnates_on_it(images):
    # A strong penalty: one minimum, which float32 reaches to any tolerance.
    config = narrow(replace(DENSE, latent_penalty=1.0, evaluation_steps=300))
    generator, params = build_generator(config, SHAPE, seed=0)

    def relative(solution):
        size = np.linalg.norm(np.asarray(solution.value.z, np.float32), axis=1)
        return np.asarray(solution.residual.state) / size

    above = solve(generator, params, images, config)  # the evaluation's tolerance
    assert np.all(above.result == Result.converged)
    assert np.all(relative(above) <= 1.01 * EPS)
    x0, z0 = generator.start(params, BATCH)
    below = jdeq.joint_solve(
        generator.problem, params, images, x0, z0, rtol=1e-5, max_steps=300, patience=40
    )
    assert np.all(below.result == Result.stagnated)
    assert np.all(below.steps < 300)
    assert np.all(relative(below) < EPS)
    assert np.all(relative(below) > EPS / 64)


def test_the_training_gradient_is_float32s_to_the_accuracy_of_bfloat16(images):
    compute = jax.jit(gradient, static_argnums=0)
    _, wide, metrics, _ = compute(DENSE, images)
    _, found, narrow_metrics, solution = compute(narrow(DENSE), images)
    z, x, mu = solution.value
    assert (z.dtype, x.dtype, mu.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    measured = jax.tree.leaves((found, narrow_metrics, solution.residual, solution.aux))
    assert {leaf.dtype for leaf in measured} == {jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(found), strict=True):
        assert np.all(np.isfinite(b))
        assert np.linalg.norm(a - b) < 2 * EPS * np.linalg.norm(a)
        assert np.linalg.norm(a - b) > 0  # else nothing was computed in bfloat16
    assert narrow_metrics["loss"] == pytest.approx(float(metrics["loss"]), rel=EPS)
    assert narrow_metrics["failed"] == 0
