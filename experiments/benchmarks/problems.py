"""The three equilibrium problems on which solvers are compared.

- ``dense``: a tanh cell of 256 units, a contraction by construction.
- ``mnist``: the cell of the published MNIST classifier at 28x28 (`experiments.adversarial.model`).
- ``uneven``: a dense cell of which every problem needs its own number of steps, from 5 to 200.

What does not depend on the state (the injection) is computed once before a solve, in all libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.adversarial.model import PRESETS, Classifier, ClassifierConfig

PyTree = Any


@dataclass(frozen=True, eq=False)  # Hashed by identity.
class Problem:
    """An equilibrium ``z = cell(params, z, inject(params, x))`` and the loss ``sum(weights z)``.

    Attributes:
        name: how it is called in tables.
        cell: ``cell(params, z, injected) -> z``.
        inject: ``inject(params, x) -> injected``, every leaf ``[B, ...]``.
        params: parameters, differentiated.
        x: inputs, every leaf ``[B, ...]``, differentiated.
        z0: start, zeros.
        weights: cotangent of the loss, like ``z0``.
        max_steps: a limit that no contestant that converges should meet.
    """

    name: str
    cell: Callable[[PyTree, PyTree, PyTree], PyTree]
    inject: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    x: PyTree
    z0: PyTree
    weights: PyTree
    max_steps: int

    def loss(self, z: PyTree) -> Array:
        """The scalar that is differentiated."""
        return inner_product(self.weights, z)


def inner_product(weights: PyTree, z: PyTree) -> Array:
    """The loss ``sum(weights z)`` over all leaves."""
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda w, leaf: jnp.sum(w * leaf), weights, z))


def dense(batch: int = 256, units: int = 256, norm: float = 0.95) -> Problem:
    """``z = tanh(z W + (x U + b))`` with ``||W||_2 = norm``; W, U and x Gaussian."""
    keys = jax.random.split(jax.random.key(0), 4)
    w = jax.random.normal(keys[0], (units, units))
    params = {
        "w": w * (norm / jnp.linalg.norm(w, 2)),
        "u": jax.random.normal(keys[1], (units, units)) / jnp.sqrt(units),
        "b": jnp.zeros(units),
    }
    return Problem(
        name="dense",
        cell=_tanh_cell,
        inject=_affine,
        params=params,
        x=jax.random.normal(keys[2], (batch, units)),
        z0=jnp.zeros((batch, units)),
        weights=jax.random.normal(keys[3], (batch, units)),
        max_steps=100,
    )


def _tanh_cell(params: PyTree, z: Array, injected: Array) -> Array:
    return jnp.tanh(z @ params["w"] + injected)


def _affine(params: PyTree, x: Array) -> Array:
    return x @ params["u"] + params["b"]


def mnist(batch: int = 48, config: ClassifierConfig = PRESETS["mnist-published"]) -> Problem:
    """The published multiscale cell, untrained, on uniform random images.

    As initialised it has no equilibrium that an iteration finds, since every normalisation undoes
    what its convolution makes small. Three scales are lowered until it contracts (20 to 30 steps);
    an evaluation costs what it did.
    """
    model = Classifier(config, rngs=nnx.Rngs(0))
    del model.output  # The head takes no part.
    for norm in (*model.multiscale.norms, *(block.norm for block in model.multiscale.blocks[1:])):
        norm.scale = nnx.Param(jnp.full_like(jnp.asarray(norm.scale), 0.35))
    for up in model.multiscale.up.values():
        up.norm.scale = nnx.Param(jnp.full_like(jnp.asarray(up.norm.scale), 0.3))
    graph, params = nnx.split(model)
    z0 = tuple(jnp.zeros(shape) for shape in model.multiscale.shapes(batch, config.image_shape[:2]))
    keys = jax.random.split(jax.random.key(1), len(z0) + 1)

    def cell(params: PyTree, z: PyTree, injected: Array) -> PyTree:
        absent = [None] * (len(config.widths) - 1)
        return nnx.merge(graph, params).multiscale(z, [injected, *absent])

    return Problem(
        name="mnist",
        cell=cell,
        inject=lambda params, x: nnx.merge(graph, params).inject(x),
        params=params,
        x=jax.random.uniform(keys[0], (batch, *config.image_shape)),
        z0=z0,
        weights=tuple(jax.random.normal(key, z.shape) for key, z in zip(keys[1:], z0, strict=True)),
        max_steps=100,
    )


def uneven(
    batch: int = 256, units: int = 256, fewest: int = 3, most: int = 214, tolerance: float = 1e-5
) -> Problem:
    """``z = tanh(r z Q + x)``, Q orthogonal, the factor r of each problem an input.

    The error of problem b shrinks by about ``r_b`` a step, ``r_b = tolerance^(1 / n_b)`` with
    ``n_b`` evenly spread from ``fewest`` to ``most``, in mixed order (the defaults need 5 to 200
    steps, since the factor and the start deviate from that law). The eigenvalues of a random
    Q lie evenly on the circle, where extrapolation gains little over the plain iteration, so that
    the accelerated methods find an uneven batch too. Inputs are small: tanh is nearly linear.
    """
    keys = jax.random.split(jax.random.key(2), 4)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (units, units)))
    steps = jax.random.permutation(keys[1], jnp.linspace(fewest, most, batch))
    x = {
        "factor": (tolerance ** (1 / steps))[:, None],
        "shift": 0.02 * jax.random.normal(keys[2], (batch, units)),
    }
    return Problem(
        name="uneven",
        cell=_scaled_cell,
        inject=lambda params, x: x,
        params={"w": q},
        x=x,
        z0=jnp.zeros((batch, units)),
        weights=jax.random.normal(keys[3], (batch, units)),
        max_steps=300,
    )


def _scaled_cell(params: PyTree, z: Array, injected: PyTree) -> Array:
    return jnp.tanh(injected["factor"] * (z @ params["w"]) + injected["shift"])


PROBLEMS: dict[str, Callable[..., Problem]] = {"dense": dense, "mnist": mnist, "uneven": uneven}


def spread_over_devices(problem: Problem) -> Problem:
    """The problem with its batch in equal parts on all devices that JAX sees."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), (AxisType.Auto,))
    by_row, whole = (
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )
    return replace(
        problem,
        params=jax.device_put(problem.params, whole),
        x=jax.device_put(problem.x, by_row),
        z0=jax.device_put(problem.z0, by_row),
        weights=jax.device_put(problem.weights, by_row),
    )


def row_norms(tree: PyTree) -> np.ndarray:
    """2-norm over all leaves of each problem, ``[B]``, taken in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.sqrt(sum((leaf**2).reshape(len(leaf), -1).sum(1) for leaf in leaves))


class Judge:
    """Checks answers of one problem, whoever found them."""

    def __init__(self, problem: Problem):
        self._params, self._x = problem.params, problem.x
        self._weights = problem.weights

        @jax.jit
        def image(params: PyTree, x: PyTree, z: PyTree) -> PyTree:
            return problem.cell(params, z, problem.inject(params, x))

        @jax.jit
        def pull_back(params: PyTree, x: PyTree, z: PyTree, u: PyTree) -> PyTree:
            injected = problem.inject(params, x)
            _, vjp = jax.vjp(lambda z: problem.cell(params, z, injected), z)
            return jax.tree.map(jnp.add, vjp(u)[0], problem.weights)

        self._image, self._pull_back = image, pull_back

    def residual(self, z: PyTree) -> float:
        """The largest ``||f(z) - z|| / ||f(z)||`` of all problems."""
        return _worst(self._image(self._params, self._x, z), z)

    def adjoint_residual(self, z: PyTree, u: PyTree) -> float:
        """The largest ``||g(u) - u|| / ||g(u)||`` of ``g(u) = (df/dz)^T u + weights``."""
        return _worst(self._pull_back(self._params, self._x, z, u), u)


def _worst(image: PyTree, value: PyTree) -> float:
    difference = jax.tree.map(
        lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), image, value
    )
    ratio = row_norms(difference) / row_norms(image)
    return float(np.max(np.where(np.isfinite(ratio), ratio, np.inf)))
