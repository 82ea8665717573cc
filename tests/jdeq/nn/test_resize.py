"""Upsampling against jax.image and by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jdeq.nn import bilinear_upsample, nearest_upsample

X = np.random.default_rng(0).normal(size=(2, 3, 5, 4))


def test_nearest_repeats_pixels():
    want = X.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(nearest_upsample(X, 4), want)


@pytest.mark.parametrize("size", [(6, 10), (3, 5), (7, 13), (24, 20)])
def test_bilinear_is_jax_images(size):
    def theirs(x):
        return jax.image.resize(x, (2, *size, 4), "bilinear")

    np.testing.assert_allclose(bilinear_upsample(X, size), theirs(X), rtol=1e-12, atol=1e-12)
    out = np.random.default_rng(1).normal(size=(2, *size, 4))
    (got,) = jax.vjp(lambda x: bilinear_upsample(x, size), X)[1](out)
    (want,) = jax.vjp(theirs, X)[1](out)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_going_down_is_refused():
    with pytest.raises(ValueError, match=r"size=\(6, 4\) for a map of 3 x 5"):
        bilinear_upsample(X, (6, 4))
