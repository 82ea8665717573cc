"""Variational masks: their values, their mean, what they do."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jdeq.nn import apply_mask, variational_masks


def test_masks_are_per_problem_and_channel_with_mean_one():
    masks = variational_masks(jax.random.key(0), rate=0.25, batch=4000, widths=(3, 5))
    assert [m.shape for m in masks] == [(4000, 3), (4000, 5)]
    for mask in masks:
        values = np.unique(np.asarray(mask))
        np.testing.assert_allclose(values, [0, 4 / 3], rtol=1e-6)
        np.testing.assert_allclose(np.mean(mask), 1, atol=0.02)
    assert not np.array_equal(masks[0][:, :3], masks[1][:, :3])


def test_a_mask_is_constant_over_pixels():
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 5))
    (mask,) = variational_masks(jax.random.key(0), rate=0.5, batch=4, widths=(5,))
    np.testing.assert_allclose(apply_mask(x, mask), x * np.asarray(mask)[:, None, None, :])
    assert apply_mask(x, None) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match=f"rate={rate}"):
        variational_masks(jax.random.key(0), rate=rate, batch=2, widths=(3,))
