"""How far apart two sets of images are, by the features of a network.

The Fréchet distance between normal distributions fitted to the features (Heusel et al., 2017), and
precision and recall by the features' nearest neighbours (Kynkäänniemi et al., 2019). Which network
the features are of is the caller's to say: only with the published Inception network would the
distance be the FID.
"""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestNeighbors

_NEIGHBOURS = 3
_CHUNK = 512


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """`||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`.

    Both sets should have the same size: covariances of few features are biased.

    Args:
        a: Features [N, D].
        b: Features [M, D].

    Raises:
        ValueError: A set has fewer than two features, or their dimensions differ.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"features of shapes {a.shape} and {b.shape} were given; two sets of at least two "
            "features of the same dimension are expected."
        )
    a, b = a.astype(np.float64), b.astype(np.float64)
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    # The product of two covariances is not symmetric; this has its eigenvalues and is.
    root = _square_root(first)
    eigenvalues = np.linalg.eigvalsh(root @ second @ root)
    cross = np.sum(np.sqrt(np.maximum(eigenvalues, 0)))
    return float(max(0.0, shift + np.trace(first) + np.trace(second) - 2 * cross))


def precision_recall(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """(precision, recall) with the balls that reach to the third neighbour in the same set.

    Args:
        real: Features [N, D] of real images, more than three.
        generated: Features [M, D] of generated images, more than three.

    Returns:
        The share of generated features within some real feature's ball, and the share of real
        features within some generated feature's.

    Raises:
        ValueError: A set has no more than three features.
    """
    if min(len(real), len(generated)) <= _NEIGHBOURS:
        raise ValueError(
            f"{len(real)} and {len(generated)} features were given; more than {_NEIGHBOURS} of "
            "each are expected."
        )
    # Squared distances are differences of squared lengths: in float32, and far from the origin,
    # little would be left of them.
    centre = real.mean(axis=0, dtype=np.float64)
    real, generated = real - centre, generated - centre
    return _covered(generated, real), _covered(real, generated)


def _covered(points: np.ndarray, centres: np.ndarray) -> float:
    """Share of the points that lie in the ball of some centre."""
    search = NearestNeighbors(algorithm="brute").fit(centres)
    # A centre is its own nearest neighbour.
    radii = search.kneighbors(centres, _NEIGHBOURS + 1)[0][:, -1]
    squares = np.sum(centres**2, axis=1)
    inside = 0
    for start in range(0, len(points), _CHUNK):
        chunk = points[start : start + _CHUNK]
        distances = np.sum(chunk**2, axis=1)[:, None] + squares - 2 * chunk @ centres.T
        inside += int(np.sum(np.any(distances <= radii**2, axis=1)))
    return inside / len(points)


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric positive semidefinite matrix."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T
