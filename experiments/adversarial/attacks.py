"""Attacks on equilibrium classifiers: joint, PGD, FGSM, noise, and transfer from another model.

    victim = Victim(network, params)
    found = attack(PGD("l2", steps=100, restarts=5), victim, images, labels, radius=1.0)
    accuracy = jnp.mean(found.logits.argmax(-1) == labels)

Each attack maximises the cross-entropy of the label over perturbations in a ball of the l2 or the
linf norm, cut by the box that pixels live in. They differ in how the gradient comes about: PGD and
FGSM solve the equilibrium and its adjoint equation at every step, the joint attack solves both
along with the perturbation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jdeq
from experiments.adversarial.ascent import ascent, steepest
from experiments.adversarial.checks import check_images
from experiments.adversarial.problem import Ball, Network, Norm, cross_entropy
from jdeq.joint import InnerSolve

PyTree = Any

_BATCH = 250
_TIGHT = InnerSolve(rtol=1e-3, warm_start=True)


@dataclass(frozen=True, eq=False)
class Victim:
    """A trained classifier.

    Attributes:
        network: the classifier.
        params: its parameters.
    """

    network: Network
    params: PyTree

    def predict(self, images: Array) -> Array:
        """Logits [B, classes] of images [B, H, W, C] in [0, 1], differentiable in the images."""
        return self.network.predict(self.params, images)


class Attacked(NamedTuple):
    """What an attack found.

    Attributes:
        images: attacked images, [N, H, W, C] in [0, 1].
        perturbation: what was added to the images, within ball and box.
        logits: of the attacked images at their equilibria, [N, classes].
        loss: their cross-entropy, [N].
    """

    images: Any
    perturbation: Any
    logits: Any
    loss: Any

    def correct(self, labels: np.ndarray) -> np.ndarray:
        """Which images are still recognised, bool [N]."""
        return self.logits.argmax(-1) == labels


class Attack(Protocol):
    """A way to find perturbations."""

    @property
    def norm(self) -> Norm:
        """Of the ball."""

    @property
    def restarts(self) -> int:
        """How many starts an image gets, at most: those after the first only if it survives."""

    @property
    def random_start(self) -> bool:
        """Whether the first start is random, as all others are; else it is zero."""

    def search(self, victim: Victim, labels: Array, ball: Ball, u0: Array) -> Array:
        """The perturbations that are found from `u0`, in units of the radius."""


@dataclass(frozen=True)
class Joint:
    """Perturbation, equilibrium and adjoint in one joint solve.

    The length of its steps decays along a cosine, see `ascent`.

    Attributes:
        norm: of the ball.
        steps: iterations, each an evaluation of the cell and a vector-Jacobian product.
        rate: length of the first step, in radii.
        momentum: in [0, 1).
        hold: iterations at the beginning in which state and adjoint settle and the perturbation
            stays.
        relaxation: of state and adjoint, in (0, 2); above 1 it needs a cell whose eigenvalues are
            not far below zero.
        restarts: starts an image gets, at most.
        random_start: whether the first start is random, too; else it is zero.
    """

    norm: Norm = "l2"
    steps: int = 20
    rate: float = 0.5
    momentum: float = 0.0
    hold: int = 0
    relaxation: float = 1.0
    restarts: int = 1
    random_start: bool = False

    @property
    def method(self) -> jdeq.joint.Descent:
        """For `joint_solve` and `input_value`."""
        optimizer = ascent(
            self.norm, self.rate, decay_steps=self.steps, momentum=self.momentum, hold=self.hold
        )
        return jdeq.joint.Descent(
            optimizer, state_relaxation=self.relaxation, adjoint_relaxation=self.relaxation
        )

    def search(self, victim: Victim, labels: Array, ball: Ball, u0: Array) -> Array:
        """See `Attack`."""
        network, params = victim.network, victim.params
        solution = jdeq.joint_solve(
            network.problems[self.norm], params, labels, u0, network.start(params, len(labels)),
            data=ball, method=self.method, max_steps=self.steps,
        )  # fmt: skip
        return solution.value.x


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent through full solves of the equilibrium (Madry et al. 2018).

    Attributes:
        norm: of the ball.
        steps: steps on the perturbation.
        rate: length of a step, in radii; None is `4 / steps`, published for 20 steps.
        momentum: in [0, 1), see `ascent`.
        restarts: starts an image gets, at most.
        random_start: whether the first start is random, too; else it is zero.
        inner: how state and adjoint are solved for.
    """

    norm: Norm = "l2"
    steps: int = 20
    rate: float | None = None
    momentum: float = 0.0
    restarts: int = 1
    random_start: bool = False
    inner: InnerSolve = _TIGHT

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """For `nested_solve`."""
        rate = 4 / self.steps if self.rate is None else self.rate
        return ascent(self.norm, rate, momentum=self.momentum)

    def solve(self, network: Network, params: PyTree, labels: Array, ball: Ball, u0: Array) -> Any:
        """The nested solve; the input after the last step is measured, too."""
        return jdeq.nested_solve(
            network.problems[self.norm], params, labels, u0, network.start(params, len(labels)),
            data=ball, optimizer=self.optimizer, forward=self.inner, rtol=0.0, atol=0.0,
            max_steps=self.steps + 1,
        )  # fmt: skip

    def search(self, victim: Victim, labels: Array, ball: Ball, u0: Array) -> Array:
        """See `Attack`."""
        return self.solve(victim.network, victim.params, labels, ball, u0).value.x


def published_pgd(norm: Norm = "l2") -> PGD:
    """The baseline of Gurumurthy et al. (2021): 20 steps, cold solves of 18 steps each way."""
    return PGD(norm, inner=InnerSolve(max_steps=18, rtol=0.0, warm_start=False))


@dataclass(frozen=True)
class FGSM:
    """One step along the gradient, as long as the ball allows (Goodfellow et al. 2015).

    Attributes:
        norm: of the ball.
        restarts: starts an image gets, at most.
        random_start: whether the first start is random, too; else it is zero.
    """

    norm: Norm = "l2"
    restarts: int = 1
    random_start: bool = False

    def search(self, victim: Victim, labels: Array, ball: Ball, u0: Array) -> Array:
        """See `Attack`."""

        def loss(images: Array) -> Array:
            return jnp.sum(cross_entropy(victim.predict(images), labels))

        gradient = jax.grad(loss)(ball.perturbed(u0))
        return ball.project(u0 + _steepest(gradient, self.norm), self.norm)


@dataclass(frozen=True)
class Noise:
    """Random directions, as far as the ball allows: what an attack has to beat.

    Attributes:
        norm: of the ball.
        restarts: directions an image gets, at most.
        random_start: True.
    """

    norm: Norm = "l2"
    restarts: int = 10
    random_start: bool = True

    def search(self, victim: Victim, labels: Array, ball: Ball, u0: Array) -> Array:
        """See `Attack`."""
        del victim, labels
        return ball.project(u0 + _steepest(u0, self.norm), self.norm)


@dataclass(frozen=True, eq=False)
class Transfer:
    """What fools another model.

    Attributes:
        source: the other model.
        attack: found against it.
    """

    source: Victim
    attack: Attack

    @property
    def norm(self) -> Norm:
        """Of the ball."""
        return self.attack.norm

    @property
    def restarts(self) -> int:
        """Starts an image gets, at most."""
        return self.attack.restarts

    @property
    def random_start(self) -> bool:
        """Whether the first start is random."""
        return self.attack.random_start

    def search(self, victim: Victim, labels: Array, ball: Ball, u0: Array) -> Array:
        """See `Attack`."""
        del victim
        return self.attack.search(self.source, labels, ball, u0)


def attack(
    method: Attack,
    victim: Victim,
    images: Any,
    labels: Any,
    radius: float,
    *,
    seed: int = 0,
    batch_size: int = _BATCH,
) -> Attacked:
    """Attack images; of several starts the first that fools the model is kept, else the worst.

    Args:
        method: the attack.
        victim: the model.
        images: [N, H, W, C] of a floating dtype, in [0, 1].
        labels: int [N], each a class of the model.
        radius: of the ball, at least 0; 0 gives the clean answer.
        seed: of random starts.
        batch_size: images attacked at once.

    Returns:
        What was found, one entry an image.

    Raises:
        ValueError: if images, labels or radius are not as described.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    check_images(victim.network.sizes, images, labels, radius)
    images, labels = images.astype(np.float32), labels.astype(np.int32)
    size = min(batch_size, len(images))
    best = _clean(victim, images, labels, size)
    fooled = np.zeros(len(images), bool)
    for restart in range(method.restarts):
        alive = np.flatnonzero(~fooled)
        if not len(alive):
            break
        key = jax.random.fold_in(jax.random.key(seed), restart)
        starts_random = restart > 0 or method.random_start
        found = _search(
            method, victim, images[alive], labels[alive], radius,
            key if starts_random else None, size,
        )  # fmt: skip
        broken = found.logits.argmax(-1) != labels[alive]
        # A first attack counts as it is, be it weaker than none: that is worth knowing.
        better = broken | (found.loss > best.loss[alive]) | (restart == 0)
        for kept, new in zip(best, found, strict=True):
            kept[alive[better]] = new[better]
        fooled[alive] = broken
    return best


@partial(jax.jit, static_argnums=2)
def random_start(key: Array, ball: Ball, norm: Norm) -> Array:
    """Perturbations drawn evenly from the ball, projected into the box, in units of the radius."""
    shape = ball.image.shape
    if norm == "linf":
        return ball.project(jax.random.uniform(key, shape, minval=-1.0, maxval=1.0), norm)
    direction, length = jax.random.split(key)
    u = jax.random.normal(direction, shape)
    u /= jnp.sqrt(jnp.sum(u**2, axis=(1, 2, 3), keepdims=True))
    share = jax.random.uniform(length, (shape[0], 1, 1, 1)) ** (1 / ball.image[0].size)
    return ball.project(share * u, norm)


def in_batches(size: int, function: Any, *arrays: np.ndarray) -> Any:
    """`function` of the arrays, `size` entries at a time; its results joined again.

    The last batch is filled up by repeating its last entry, so that nothing compiles anew.
    """
    count = len(arrays[0])
    parts = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        kept = min(size, count - start)
        result = function(*(jnp.asarray(array[rows]) for array in arrays))
        parts.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], result))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _search(
    method: Attack,
    victim: Victim,
    images: np.ndarray,
    labels: np.ndarray,
    radius: float,
    key: Array | None,
    size: int,
) -> Attacked:
    def run(images: Array, labels: Array, index: Array) -> Attacked:
        ball = Ball(images, jnp.full(len(images), radius, images.dtype))
        u0 = jnp.zeros_like(images)
        if key is not None:
            u0 = random_start(jax.random.fold_in(key, index[0]), ball, method.norm)
        return _outcome(victim, labels, ball, method.search(victim, labels, ball, u0), method.norm)

    return in_batches(size, run, images, labels, np.arange(len(images)))


def _clean(victim: Victim, images: np.ndarray, labels: np.ndarray, size: int) -> Attacked:
    def run(images: Array, labels: Array) -> Attacked:
        nothing = Ball(images, jnp.zeros(len(images), images.dtype))
        return _outcome(victim, labels, nothing, jnp.zeros_like(images), "l2")

    return in_batches(size, run, images, labels)


def _outcome(victim: Victim, labels: Array, ball: Ball, u: Array, norm: Norm) -> Attacked:
    images, perturbation = _apply(ball, u, norm)
    logits = victim.predict(images)
    return Attacked(images, perturbation, logits, cross_entropy(logits, labels))


@partial(jax.jit, static_argnums=2)
def _apply(ball: Ball, u: Array, norm: Norm) -> tuple[Array, Array]:
    """The attacked images, and what was added: once more made feasible, in units of pixels."""
    perturbation = ball.nearest(ball.perturbation(u), norm)
    return jnp.clip(ball.image + perturbation, 0, 1), perturbation


def _steepest(gradients: Array, norm: Norm) -> Array:
    return jax.vmap(partial(steepest, norm=norm))(gradients)
