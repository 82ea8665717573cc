"""The prior of the latents, the gradient of training for a task, methods and their choice."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from experiments.common.data import ArrayImages, ImageData, Split
from experiments.common.step import split_each
from experiments.generative.config import PRESETS as GENERATIVE
from experiments.inverse import train, tuning
from experiments.inverse.config import PRESETS
from experiments.inverse.evaluate import _within
from experiments.inverse.measurements import KINDS, corrupt, setting
from experiments.inverse.prior import Prior
from experiments.inverse.problem import inverse_problem
from experiments.inverse.solvers import Batch, Method, Restored, Solver
from experiments.inverse.source import Source
from experiments.inverse.train import task_loss
from experiments.inverse.tuning import Belief, Choice, batch_of, choose_beliefs, shortest
from tests.experiments.inverse.linear import PRIOR, SHAPE, image_of, images, latents, linear


def test_standardised_latents_of_the_prior_have_its_mean_and_covariance():
    random = np.random.default_rng(0)
    drawn = (random.normal(size=(500, 3)) @ random.normal(size=(3, 3)) + 2).astype(np.float32)
    prior = Prior.of(drawn)
    np.testing.assert_allclose(prior.centre, drawn.mean(axis=0), rtol=1e-5)
    covariance = np.asarray(prior.factor) @ np.asarray(prior.factor).T
    np.testing.assert_allclose(covariance, np.cov(drawn, rowvar=False), rtol=1e-4)
    u = jnp.asarray(random.normal(size=(4, 3)), jnp.float32)
    back = np.linalg.solve(np.asarray(prior.factor), (prior.latents(u) - prior.centre).T).T
    np.testing.assert_allclose(back, u, atol=1e-4)


def test_latents_that_do_not_vary_leave_the_prior_regular():
    drawn = np.random.default_rng(0).normal(size=(50, 3)) * [1.0, 0.0, 1.0]
    assert np.linalg.cond(np.asarray(Prior.of(drawn).factor)) < 1e3


def test_one_component_costs_the_squared_norm_however_often_it_is_there():
    u = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    for prior in (Prior.standard(4), Prior.standard(4, slots=6)):
        np.testing.assert_allclose(prior.energy(u), jnp.sum(u**2, axis=1), rtol=1e-5)


def test_a_mixture_has_the_density_of_its_components_and_empty_slots_none():
    random = np.random.default_rng(0)
    centres = np.array([[-3.0, 0.0], [3.0, 1.0], [0.0, 4.0]])
    drawn = np.concatenate([random.normal(size=(200, 2)) * 0.5 + c for c in centres])
    prior, slotted = Prior.of(drawn, 3), Prior.of(drawn, 3, slots=5)
    u = jnp.asarray(random.normal(size=(6, 2)), jnp.float32)
    log_weights, means, roots = (np.asarray(leaf, np.float64) for leaf in prior.components)
    shares = np.exp(log_weights) / np.prod(np.diagonal(roots, axis1=1, axis2=2), axis=1)
    np.testing.assert_allclose(np.sum(shares), 1, rtol=1e-5)
    density = np.zeros(6)
    for share, mean, root in zip(shares, means, roots, strict=True):
        covariance = np.linalg.inv(root @ root.T)
        density += share * multivariate_normal(mean, covariance).pdf(u)
    expected = -2 * np.log(density) - 2 * np.log(2 * np.pi)  # of two dimensions
    np.testing.assert_allclose(prior.energy(u), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slotted.energy(u), prior.energy(u), rtol=1e-5)
    gradients = [jax.grad(lambda u, p=p: p.energy(u).sum())(u) for p in (prior, slotted)]
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-4)


PENALTY = 0.05
DENOISING = setting(KINDS["denoise02"], SHAPE)


def task_of(params, keys, clean, **changes):
    """The loss of denoising as a function of the parameters, with what is measured."""
    generator, _ = linear()
    config = replace(PRESETS["smoke"], **changes)
    source = Source(None, generator, GENERATIVE["smoke"], params, None)
    problem, belief = inverse_problem(generator), Belief(PRIOR, jnp.asarray(PENALTY))
    return lambda params: task_loss(
        params, problem, source, config, belief, DENOISING, clean, keys
    )  # fmt: skip


def test_the_published_gradient_of_the_task_is_that_at_constant_latents():
    _, params = linear()
    clean = jnp.asarray(images(6))
    keys = jax.random.split(jax.random.key(3), len(clean))
    task = task_of(
        params.generator, keys, clean, outer_gradient="state", inner_steps=120, inner_step_size=0.1
    )
    gradient, measured = jax.grad(task, has_aux=True)(params.generator)

    observed, _ = corrupt(DENOISING, clean, split_each(keys)[0])
    x = np.stack([latents(np.asarray(seen).ravel(), np.eye(12), PENALTY) for seen in observed])
    difference = np.stack([image_of(one) for one in x]) - np.asarray(clean).reshape(6, 12)
    # The joint solve stops at relative residuals of 1e-3, of which the tolerances are a few.
    assert measured.means["loss"] == pytest.approx(np.mean(np.sum(difference**2, axis=1)), rel=5e-3)
    expected = 2 * difference.T @ (x / 0.7) / 6
    (found,) = jax.tree.leaves(gradient)
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())


def test_the_unrolled_gradient_of_the_task_is_exact_for_the_iterations_that_are_made():
    with jax.enable_x64(True):
        _, params = linear()
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params.generator)
        clean, keys = jnp.asarray(images(4), jnp.float64), jax.random.split(jax.random.key(3), 4)
        task = jax.jit(
            task_of(
                params, keys, clean, outer_gradient="unrolled", inner_steps=15, inner_step_size=0.2
            )
        )
        gradient, _ = jax.grad(task, has_aux=True)(params)
        leaves, structure = jax.tree.flatten(params)
        direction = [jax.random.normal(jax.random.key(4), leaf.shape) for leaf in leaves]
        slope = sum(map(jnp.vdot, jax.tree.leaves(gradient), direction))

        def along(step):
            moved = [leaf + step * d for leaf, d in zip(leaves, direction, strict=True)]
            return task(jax.tree.unflatten(structure, moved))[0]

        difference = (along(1e-5) - along(-1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(difference), rel=1e-6)


def test_training_for_the_task_takes_transformed_images(monkeypatch):
    _, params = linear()
    clean, keys = jnp.asarray(images(4)), jax.random.split(jax.random.key(3), 4)
    plain = task_of(params.generator, keys, clean)(params.generator)[1].means["loss"]
    monkeypatch.setattr(train, "augmented", lambda config, images, keys: (1 - images, keys))
    other = task_of(params.generator, keys, clean)(params.generator)[1].means["loss"]
    monkeypatch.undo()
    negative = task_of(params.generator, keys, 1 - clean)(params.generator)[1].means["loss"]
    assert other == pytest.approx(float(negative), rel=1e-6)
    assert other != pytest.approx(float(plain), rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_a_generator_and_list_lengths_and_rates_in_order(name):
    config = PRESETS[name]
    assert config.generator in GENERATIVE
    assert config.rates == tuple(sorted(config.rates))  # the middle one tunes the priors
    assert config.nested_steps == tuple(sorted(config.nested_steps))  # the last is the longest


def test_joint_and_nested_find_the_minimum_at_any_rate_and_are_timed():
    generator, params = linear()
    batch = batch_of("inpaint", images())
    solver = Solver(generator)
    for method, rate in ((Method("joint", 120), 0.1), (Method("nested", 60), 0.2)):
        restored = solver.restore(method, rate, params, 0.01, batch, timed=True)
        assert 0 < restored.seconds < 10
        for one, seen, mask in zip(
            restored.images, np.asarray(batch.observed), np.asarray(batch.how.mask), strict=True
        ):
            expected = image_of(latents(seen.ravel(), np.diag(mask.ravel()), 0.01))
            np.testing.assert_allclose(one.ravel(), expected, atol=5e-3)


def test_errors_are_of_the_hidden_pixels_where_there_are_any():
    clean = images()
    everywhere = Batch(clean, None, batch_of("denoise02", clean).how)
    np.testing.assert_allclose(everywhere.squared_errors(clean + 0.1), 0.01, rtol=1e-4)
    boxed = batch_of("inpaint", clean)
    mask = np.asarray(boxed.how.mask)
    np.testing.assert_allclose(boxed.squared_errors(clean + 0.1 * mask), 0, atol=1e-12)
    np.testing.assert_allclose(boxed.squared_errors(clean + 0.2 * (1 - mask)), 0.04, rtol=1e-4)


def test_observations_are_the_same_whenever_they_are_asked_for():
    one, other = (batch_of("denoise04", images()) for _ in range(2))
    np.testing.assert_array_equal(one.observed, other.observed)


def test_the_prior_that_restores_best_is_chosen_for_each_problem(monkeypatch):
    fitting = {name: KINDS[name] for name in ("denoise02", "denoise04", "inpaint")}
    monkeypatch.setattr(tuning, "KINDS", fitting)  # these images have three columns
    generator, params = linear()
    u = np.concatenate([np.full((8, 3), 1.5), np.full((8, 3), -1.5)])
    u += 0.05 * np.random.default_rng(2).normal(size=u.shape)
    x = np.asarray(PRIOR.centre) + u @ np.asarray(PRIOR.factor).T
    clean = np.stack([image_of(one) for one in x]).reshape(-1, *SHAPE).clip(0, 1)
    clean = clean.astype(np.float32)[np.random.default_rng(3).permutation(len(clean))]
    data = ImageData("clusters", train=None, test=Split(ArrayImages(clean)))
    config = replace(
        PRESETS["smoke"], test_images=8, validation_images=8, penalties=(1.0,), joint_steps=(60,)
    )
    source = Source(data, generator, GENERATIVE["smoke"], params.generator, None)
    fits, misleads = Prior.of(x, 2), Prior.of(x + 3, 2)
    for priors, best in (([misleads, fits], fits), ([fits, misleads], fits)):
        found = choose_beliefs(source, params.generator, priors, config, Solver(generator))
        assert set(found) == set(fitting)
        assert all(belief.prior is best for belief in found.values())
        assert all(belief.penalty > 0 for belief in found.values())


def test_the_shortest_solve_that_is_good_enough_is_chosen():
    qualities = {10: 20.0, 20: 22.96, 40: 23.0, 80: 22.9}
    choices = {
        Method("joint", steps): Choice(Method("joint", steps), 0.3, psnr)
        for steps, psnr in qualities.items()
    }
    assert shortest(choices).method.steps == 20


def test_nested_gets_no_more_time_than_joint_unless_nothing_is_as_fast():
    methods = [Method("nested", steps) for steps in (2, 5, 10)]
    quality = dict(zip(methods, (15.0, 18.0, 21.0), strict=True))
    choices = {m: Choice(m, 0.3, quality[m]) for m in methods}
    timed = {m: Restored(None, seconds) for m, seconds in zip(methods, (1, 2, 4), strict=True)}
    assert _within(choices, timed, methods, seconds=3.0).steps == 5
    assert _within(choices, timed, methods, seconds=0.5).steps == 2
