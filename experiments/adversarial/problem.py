"""The input problem of the task: find the perturbation of an image that hides its label best.

The optimised input is `u`, the perturbation in units of its radius: the network sees
`image + radius u`, so that one step size, and one compiled program, serve all radii.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import jdeq
from experiments.adversarial.contractive import ContractiveClassifier, ContractiveConfig
from experiments.adversarial.model import Classifier, ClassifierConfig
from jdeq.projections import l2_ball_in_box, linf_ball_in_box

PyTree = Any
Norm = Literal["l2", "linf"]
Sizes = ClassifierConfig | ContractiveConfig

_EQUILIBRIUM_RTOL = 1e-5
_EQUILIBRIUM_STEPS = 100


class Ball(NamedTuple):
    """The set that a perturbation lies in: a ball, cut by the box that pixels live in.

    Attributes:
        image: what is perturbed, [B, H, W, C] in [0, 1].
        radius: at least 0, [B].
    """

    image: Array
    radius: Array

    def perturbation(self, u: Array) -> Array:
        """Perturbations `u` in units of pixels."""
        return _expand(self.radius) * u

    def perturbed(self, u: Array) -> Array:
        """The images under perturbations `u` in units of the radius."""
        return self.image + self.perturbation(u)

    def project(self, u: Array, norm: Norm) -> Array:
        """The nearest `u` whose perturbation lies in the set; zero where the radius is."""
        unit = _expand(jnp.where(self.radius > 0, self.radius, 1))
        return self.nearest(unit * u, norm) / unit

    def nearest(self, perturbation: Array, norm: Norm) -> Array:
        """The nearest perturbation in the set, in units of pixels."""
        project = l2_ball_in_box if norm == "l2" else linf_ball_in_box
        return project(perturbation, self.radius, -self.image, 1 - self.image)


@dataclass(frozen=True, eq=False)
class Network:
    """A classifier without its parameters.

    Attributes:
        graph: its structure.
        sizes: its sizes.
        problems: for each norm: minimise minus the cross-entropy over `u` in the `Ball`, the
            target being the label, int [B].
    """

    graph: nnx.GraphDef
    sizes: Sizes
    problems: dict[Norm, jdeq.InputProblem]

    def start(self, params: PyTree, count: int) -> PyTree:
        """The state of zeros from which solves start."""
        return nnx.merge(self.graph, params).initial_state(count)

    def contract(self, params: PyTree) -> PyTree:
        """The parameters of the nearest network whose cell is as contractive as it has to be."""
        model = nnx.merge(self.graph, params)
        model.contract()
        return nnx.state(model)

    def cell(self, params: PyTree, z: PyTree, images: Array) -> PyTree:
        """One step of the state towards its equilibrium."""
        return nnx.merge(self.graph, params).cell(z, images)

    def head(self, params: PyTree, z: PyTree) -> Array:
        """Logits [B, classes] of states."""
        return nnx.merge(self.graph, params).head(z)

    def solve(self, params: PyTree, images: Array, rtol: float, max_steps: int) -> jdeq.Solution:
        """The equilibria of images, differentiable in parameters and images."""
        z0 = self.start(params, len(images))
        return jdeq.deq(self.cell, params, images, z0, rtol=rtol, atol=0.0, max_steps=max_steps)

    def predict(self, params: PyTree, images: Array) -> Array:
        """Logits [B, classes] of images [B, H, W, C] in [0, 1] at their equilibria."""
        return _predict(self, params, images)


def build_network(sizes: Sizes, seed: int) -> tuple[Network, PyTree]:
    """A classifier and its initial parameters."""
    rngs = nnx.Rngs(seed)
    if isinstance(sizes, ContractiveConfig):
        return split_network(ContractiveClassifier(sizes, rngs=rngs), sizes)
    return split_network(Classifier(sizes, rngs=rngs), sizes)


def split_network(
    model: Classifier | ContractiveClassifier, sizes: Sizes
) -> tuple[Network, PyTree]:
    """A module with `cell`, `head`, `initial_state` and `contract` as a network and parameters."""
    graph, params = nnx.split(model)

    def cell(params: PyTree, z: PyTree, u: Array, ball: Ball) -> PyTree:
        return nnx.merge(graph, params).cell(z, ball.perturbed(u))

    def objective(params: PyTree, z: PyTree, u: Array, labels: Array, ball: Ball) -> Array:
        del u, ball
        return -cross_entropy(nnx.merge(graph, params).head(z), labels)

    def project(norm: Norm, u: Array, ball: Ball) -> Array:
        return ball.project(u, norm)

    norms: tuple[Norm, Norm] = ("l2", "linf")
    problems = {norm: jdeq.InputProblem(cell, objective, partial(project, norm)) for norm in norms}
    return Network(graph, sizes, problems), params


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Minus the log-probability of each label, [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@partial(jax.jit, static_argnums=0)
def _predict(network: Network, params: PyTree, images: Array) -> Array:
    solution = network.solve(params, images, _EQUILIBRIUM_RTOL, _EQUILIBRIUM_STEPS)
    return network.head(params, solution.value)


def _expand(numbers: Array) -> Array:
    return numbers[:, None, None, None]
