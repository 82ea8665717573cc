"""The baselines: their gradients, and what they are by definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.meta.baselines import build_baseline
from experiments.meta.baselines.imaml import imaml
from experiments.meta.baselines.networks import Body, Classifier
from experiments.meta.baselines.prototypical import nearest_neighbour
from tests.experiments.meta.learners import CLASSES, SINUSOID, learner_of

KINDS = ("proto", "maml", "fomaml", "imaml")


def given_of(config, kind):
    learner, _, tasks = learner_of(config)
    model, params = build_baseline(kind, config, tasks.support.shape[2:], seed=0)
    target = learner.target(jnp.asarray(tasks.support_label), config.ways)
    wanted = learner.target(jnp.asarray(tasks.query_label), config.ways)
    return model, params, (jnp.asarray(tasks.support), target, jnp.asarray(tasks.query)), wanted


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_serves_any_number_of_classes_in_any_order(kind):
    model, params, (support, target, query), _ = given_of(CLASSES, kind)
    scores = model.outputs(params, support, target, query)
    order = np.array([2, 0, 1])
    turned = model.outputs(params, support, target[..., order], query)
    np.testing.assert_allclose(turned, scores[..., order], atol=2e-5)
    two = model.outputs(params, support[:, :4], target[:, :4, :2], query)
    assert two.shape == (*scores.shape[:2], 2)


@pytest.mark.parametrize("kind", ["maml", "imaml"])
@pytest.mark.parametrize("config", [CLASSES, SINUSOID], ids=["classes", "sinusoid"])
def test_adapting_fits_the_support(kind, config):
    model, params, (support, target, _), _ = given_of(config, kind)
    fitted = model.outputs(params, support, target, support)
    untouched = jnp.zeros_like(fitted)
    if model.regression:
        assert jnp.mean((fitted - target) ** 2) < jnp.mean((untouched - target) ** 2)
    else:
        after = jnp.mean(optax.softmax_cross_entropy(fitted, target))
        assert after < 0.9 * jnp.log(config.ways)


def slopes(kind, config, outputs=None):
    """Directional derivatives of the query loss: automatic, and by differences."""
    with jax.enable_x64(True):
        model, params, given, wanted = given_of(config, kind)
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, given, wanted))
        params, given, wanted = wide
        made = model.outputs if outputs is None else outputs

        @jax.jit
        def loss(params):
            return jnp.mean((made(params, *given) - wanted) ** 2)

        gradient = jax.grad(loss)(params)
        random = np.random.default_rng(0)
        direction = jax.tree.map(lambda g: jnp.asarray(random.standard_normal(g.shape)), gradient)
        ahead, behind = (loss(optax.tree.add_scale(params, h, direction)) for h in (1e-6, -1e-6))
        return float(optax.tree.vdot(gradient, direction)), float((ahead - behind) / 2e-6)


def test_maml_differentiates_through_its_steps_and_first_order_does_not():
    exact, quotient = slopes("maml", SINUSOID)
    assert exact == pytest.approx(quotient, rel=1e-5)
    first_order, _ = slopes("fomaml", SINUSOID)
    assert abs(first_order / quotient - 1) > 1e-2


def test_imaml_is_the_derivative_of_its_minimiser(monkeypatch):
    # A minimum may lie on a kink, where it has no derivative.
    monkeypatch.setattr(jax.nn, "relu", jnp.tanh)
    graph, _ = nnx.split(Classifier(Body((5,), rngs=nnx.Rngs(0))))
    solved = imaml(graph, _cross_entropy, steps=600, cg_steps=60)

    def outputs(params, *given):
        return jax.lax.map(lambda task: solved(params, *task), given)

    implicit, quotient = slopes("imaml", CLASSES, outputs)
    assert implicit == pytest.approx(quotient, rel=1e-3)


def _cross_entropy(made, wanted):
    return jnp.mean(optax.softmax_cross_entropy(made, wanted))


def test_the_nearest_neighbour_is_the_class_of_the_nearest_image():
    support = jnp.array([[[0.0], [1.0], [5.0]]])[..., None]
    target = jax.nn.one_hot(jnp.array([[0, 1, 0]]), 2)
    query = jnp.array([[[0.4], [0.6], [3.5]]])[..., None]
    scores = nearest_neighbour(support, target, query)
    np.testing.assert_allclose(scores[0, 0], [-0.16, -0.36], atol=1e-6)
    np.testing.assert_array_equal(jnp.argmax(scores, -1)[0], [0, 1, 0])
