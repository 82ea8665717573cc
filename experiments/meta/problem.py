"""The input problem of few-shot learning: the fast parameters that fit a task's support."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import jdeq
from experiments.common.unrolled import unrolled_solve
from experiments.meta.config import Config, OuterGradient
from experiments.meta.model import CompactNetwork, DenseNetwork, MultiscaleNetwork, Network

PyTree = Any

_FIRST_TEMPERATURE = 8.0
_SUPPORT_TEMPERATURE = 4.0
_FIRST_PENALTY = 0.1  # beyond the least
_LEAST_PENALTIES = (0.5, 0.05)  # on the context, and on the head
_TIGHT_STEPS = 1000
_TIGHT_CYCLES = 20  # of fifty products at most


class Fast(NamedTuple):
    """The fast parameters, the x of the input problem.

    Attributes:
        context: Modulates the cell, [B, c].
        head: What is added to each class's prototype, or to each row of the linear map, [B, N, D];
            None where the head is not fast.
    """

    context: Array
    head: Array | None


class Head(nnx.Module):
    """Features to class scores, or to numbers.

    With prototypes, class n of a task scores `-t mean_d (f_d - p_nd)^2`, where `p_n` is the mean of
    the features of its support (Snell et al., 2017) plus the fast head. The temperature t is learnt
    for the queries; the support has a constant lower one, since with the former a single support
    image, which is its own prototype, has hardly any loss. Otherwise the head is a linear map, to
    whose kernel the fast head is added.
    """

    def __init__(self, features: int, outputs: int, *, prototypes: bool, rngs: nnx.Rngs):
        self.prototypes = prototypes
        if prototypes:
            self.log_temperature = nnx.Param(jnp.log(jnp.float32(_FIRST_TEMPERATURE)))
        else:
            self.linear = nnx.Linear(features, outputs, rngs=rngs)

    def classifier(self, features: Array, target: Array, fast: Array | None) -> Array:
        """What a task's support [B, n, D] and target [B, n, N] make of the head: [B, N, D]."""
        if self.prototypes:
            shares = target / jnp.maximum(jnp.sum(target, axis=1, keepdims=True), 1)
            own = jnp.einsum("bnk,bnd->bkd", shares, features)
        else:
            kernel = self.linear.kernel[...].T
            own = jnp.broadcast_to(kernel, (len(features), *kernel.shape))
        return own if fast is None else own + fast

    def __call__(self, features: Array, classifier: Array, *, support: bool = False) -> Array:
        """Scores [B, m, N] of features [B, m, D], of the support itself or of queries."""
        products = jnp.einsum("bmd,bkd->bmk", features, classifier)
        if not self.prototypes:
            assert self.linear.bias is not None
            return products + self.linear.bias[...]
        temperature = _SUPPORT_TEMPERATURE if support else jnp.exp(self.log_temperature[...])
        # The squared norm of f, which all classes share, is left out.
        distance = jnp.sum(classifier**2, axis=-1)[:, None] - 2 * products
        return -temperature * distance / features.shape[-1]


class MetaLearner(nnx.Module):
    """A network, its head, and the weights of the penalties on the fast parameters."""

    def __init__(self, network: Network, head: Head):
        self.network = network
        self.head = head
        self.raw_penalties = nnx.Param(jnp.full(2, jnp.log(jnp.expm1(_FIRST_PENALTY)), jnp.float32))

    def penalty(self, fast: Fast) -> Array:
        """`(a |v|^2 + b sum_n |h_n|^2) / 2` with learnt a and b, [B].

        Both have a lower bound: the outer gradient would otherwise make the inner problem so steep
        that the iterations of a training step no longer solve it, and be wrong.
        """
        least = jnp.asarray(_LEAST_PENALTIES, self.raw_penalties[...].dtype)
        weights = least + jax.nn.softplus(self.raw_penalties[...])
        total = weights[0] * jnp.sum(fast.context**2, axis=-1)
        if fast.head is not None:
            total = total + weights[1] * jnp.sum(fast.head**2, axis=(1, 2))
        return total / 2


@dataclass(frozen=True, eq=False)
class Learner:
    """A meta-learner without its parameters.

    Attributes:
        graph: The modules' structure.
        problem: Minimise over x, a `Fast`, the mean loss on the support plus the penalty.
        regression: Whether targets are numbers; otherwise they are classes.
        config: Settings.
    """

    graph: nnx.GraphDef
    problem: jdeq.InputProblem
    regression: bool
    config: Config

    @property
    def solver(self) -> jdeq.solvers.Picard | jdeq.solvers.Anderson:
        """Of the queries' equilibria: on a contraction Picard's steps, which cost least."""
        if self.config.network == "multiscale":
            return jdeq.solvers.Anderson()
        return jdeq.solvers.Picard()

    def merge(self, params: PyTree) -> MetaLearner:
        """The modules with these parameters."""
        return nnx.merge(self.graph, params)

    def contract(self, params: PyTree) -> PyTree:
        """The parameters with the cell scaled down to a contraction."""
        model = self.merge(params)
        model.network.contract()
        return nnx.state(model)

    def inject(self, params: PyTree, examples: Array) -> PyTree:
        """Injections, every leaf [B, n, ...], of examples [B, n, ...]."""
        tasks, count = examples.shape[:2]
        flat = self.merge(params).network.inject(examples.reshape(-1, *examples.shape[2:]))
        return jax.tree.map(lambda leaf: leaf.reshape(tasks, count, *leaf.shape[1:]), flat)

    def start(self, params: PyTree, tasks: int, examples: int, ways: int) -> tuple[Fast, PyTree]:
        """(x0, z0), zeros in the dtype of the parameters."""
        model = self.merge(params)
        z0 = model.network.initial_state(tasks, examples)
        head = None
        if self.config.fast_head:
            width = jax.eval_shape(model.network.features, z0).shape[-1]
            head = jnp.zeros((tasks, ways, width))
        fast = Fast(jnp.zeros((tasks, self.config.context)), head)
        dtype = jax.tree.leaves(params)[0].dtype
        return jax.tree.map(lambda leaf: leaf.astype(dtype), (fast, z0))

    def target(self, labels: Array, ways: int) -> Array:
        """What losses compare with: classes one-hot [B, n, ways], numbers [B, n, 1]."""
        return labels if self.regression else jax.nn.one_hot(labels, ways)

    def losses(self, outputs: Array, target: Array) -> Array:
        """The loss of each example, [B, n]."""
        return losses_of(outputs, target, self.regression)

    def adapt(
        self, params: PyTree, support: Array, target: Array, gradient: OuterGradient | None = None
    ) -> jdeq.Solution:
        """The solve of the tasks' fast parameters, as in training.

        Args:
            params: Parameters.
            support: [B, n, ...].
            target: [B, n, N].
            gradient: How the solution is differentiated; None as the settings say.
        """
        config = self.config
        gradient = config.outer_gradient if gradient is None else gradient
        x0, z0, data = self._given(params, support, target)
        given = (self.problem, params, target)
        shared: dict[str, Any] = {"data": data, "rtol": config.inner_rtol}
        if gradient == "unrolled":
            return unrolled_solve(
                *given, x0, z0, step_size=config.inner_step, steps=config.inner_steps, **shared
            )
        adjoint = implicit_gradient(gradient, config)
        if config.inner == "joint":
            return jdeq.joint_solve(
                *given, x0, z0, adjoint=adjoint, method=joint_method(config),
                max_steps=config.inner_steps, **shared,
            )  # fmt: skip
        optimizer, steps = nested_optimizer(config.nested_rate), config.nested_steps
        inner = jdeq.joint.InnerSolve(solver=self.solver)
        found = jdeq.nested_solve(
            *given, x0, z0, optimizer=optimizer, forward=inner, max_steps=steps, **shared
        )
        # Implicit gradients do not ask how the point was found: a joint solve of one step from it
        # returns it as it is, with the gradient that is wanted.
        z, x, mu = jax.lax.stop_gradient(found.value)
        attached = jdeq.joint_solve(*given, x, z, mu0=mu, adjoint=adjoint, max_steps=1, **shared)
        return dataclasses.replace(attached, steps=found.steps, result=found.result)

    def adapt_tightly(
        self, params: PyTree, support: Array, target: Array, rtol: float
    ) -> jdeq.Solution:
        """The solve to a tight tolerance, with the exact gradient."""
        x0, z0, data = self._given(params, support, target)
        adjoint = jdeq.adjoints.KKTImplicit(rtol=10 * rtol, max_steps=_TIGHT_CYCLES)
        return jdeq.joint_solve(
            self.problem, params, target, x0, z0, data=data, adjoint=adjoint, rtol=rtol,
            atol=0.0, max_steps=_TIGHT_STEPS,
        )  # fmt: skip

    def _given(self, params: PyTree, support: Array, target: Array) -> tuple[Fast, PyTree, PyTree]:
        """(x0, z0, data) of the tasks' input problems."""
        tasks, examples, ways = target.shape
        return *self.start(params, tasks, examples, ways), self.inject(params, support)

    def predict(
        self,
        params: PyTree,
        adapted: jdeq.AugmentedState,
        target: Array,
        query: Array,
        rtol: float | None = None,
    ) -> Array:
        """Scores or numbers [B, m, N] for the queries [B, m, ...] of adapted tasks.

        Args:
            params: Parameters.
            adapted: Solution of the tasks' input problems.
            target: Of the support, [B, n, N].
            query: Examples.
            rtol: Tolerance of their equilibria; None as in training.
        """
        config = self.config
        _, z0 = self.start(params, query.shape[0], query.shape[1], target.shape[-1])
        limit = config.query_steps if rtol is None else 300
        tolerance = config.query_rtol if rtol is None else rtol
        equilibrium = jdeq.deq(
            self.problem.cell, params, adapted.x, z0, data=self.inject(params, query),
            solver=self.solver, rtol=tolerance, atol=0.0, max_steps=limit,
        )  # fmt: skip
        model = self.merge(params)
        support = model.network.features(adapted.z)
        classifier = model.head.classifier(support, target, adapted.x.head)
        return model.head(model.network.features(equilibrium.value), classifier)


def build_learner(
    config: Config, shape: tuple[int, ...], ways: int, seed: int
) -> tuple[Learner, PyTree]:
    """The learner of the settings and its initial parameters.

    Args:
        config: Settings.
        shape: Of an example: (height, width, channels), or (numbers,).
        ways: Outputs of a linear head; a head of prototypes has as many as the task has classes.
        seed: Of the initial parameters.
    """
    rngs = nnx.Rngs(seed)
    network = _network(config, shape, rngs)
    state = jax.eval_shape(lambda: network.initial_state(1, 1))
    width = jax.eval_shape(network.features, state).shape[-1]
    head = Head(width, ways, prototypes=config.head == "prototypes", rngs=rngs)
    graph, params = nnx.split(MetaLearner(network, head))
    regression = config.dataset == "sinusoid"

    def cell(params: PyTree, z: PyTree, x: Fast, injection: PyTree) -> PyTree:
        return nnx.merge(graph, params).network.cell(z, x.context, injection)

    def objective(params: PyTree, z: PyTree, x: Fast, target: Array, injection: PyTree) -> Array:
        model = nnx.merge(graph, params)
        features = model.network.features(z)
        classifier = model.head.classifier(features, target, x.head)
        outputs = model.head(features, classifier, support=True)
        losses = losses_of(outputs, target, regression)
        return jnp.mean(losses, axis=-1) + model.penalty(x)

    return Learner(graph, jdeq.InputProblem(cell, objective), regression, config), params


def _network(config: Config, shape: tuple[int, ...], rngs: nnx.Rngs) -> Network:
    if config.network == "dense":
        return DenseNetwork(
            shape[0],
            width=config.channels[0],
            context=config.context,
            contraction=config.contraction,
            rngs=rngs,
        )
    height, width, channels = shape
    if config.network == "multiscale":
        return MultiscaleNetwork(
            (height, width, channels), widths=config.channels, context=config.context, rngs=rngs
        )
    inner, outer = config.channels
    return CompactNetwork(
        (height, width, channels),
        channels=(inner, outer),
        strides=config.strides,
        context=config.context,
        contraction=config.contraction,
        rngs=rngs,
    )


def losses_of(outputs: Array, target: Array, regression: bool) -> Array:
    """The loss of each example, [B, n]: squared error, or cross-entropy."""
    if regression:
        return jnp.sum((outputs - target) ** 2, axis=-1)
    return optax.softmax_cross_entropy(outputs, target)


def implicit_gradient(gradient: OuterGradient, config: Config) -> Any:
    """The adjoint of `jdeq.joint_solve`, its system solved as far as training needs it."""
    if gradient == "state":
        return jdeq.adjoints.StateImplicit(rtol=config.outer_rtol, max_steps=config.outer_steps)
    solver = jdeq.solvers.GMRES(dimension=config.outer_steps, reduction=config.outer_rtol)
    # One cycle, whose outcome the second step measures: within 3 times what the cycle aims at it
    # is good enough, and no other is begun.
    return jdeq.adjoints.KKTImplicit(solver, rtol=3 * config.outer_rtol, max_steps=2)


def joint_method(config: Config) -> jdeq.joint.Descent:
    """Adam on x inside the augmented map, its step decayed by a cosine."""
    return jdeq.joint.Descent(step_size=config.inner_step)


@cache
def nested_optimizer(rate: float) -> optax.GradientTransformation:
    """Adam; cached, since optax transformations compare by identity."""
    return optax.adam(rate)
