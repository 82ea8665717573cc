"""A small classifier, clean images that it is attacked at, and their labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.adversarial.attacks import Victim
from experiments.adversarial.contractive import ContractiveConfig
from experiments.adversarial.problem import build_network

SIZES = ContractiveConfig((8, 8, 1), stem=4, width=6, features=12)


@pytest.fixture(scope="session")
def victim():
    network, params = build_network(SIZES, 0)
    # An untrained head hardly tells images apart; sharper, attacks have something to find.
    return Victim(network, jax.tree.map(lambda leaf: 2.0 * leaf, params))


@pytest.fixture(scope="session")
def images():
    pixels = np.random.default_rng(0).random((12, 8, 8, 1), np.float32)
    pixels[0] = 0.0  # the box leaves half of the ball
    pixels[1] = 1.0
    return pixels


@pytest.fixture(scope="session")
def labels(victim, images):
    return np.asarray(victim.predict(jnp.asarray(images)).argmax(-1), np.int32)
