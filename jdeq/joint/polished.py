"""Descent, then quasi-Newton steps on settled gradients: the default method."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jdeq import _options, _tree
from jdeq.joint.augmented import (
    AugmentedState,
    Evaluation,
    KKTResidual,
    relative_length,
)
from jdeq.joint.descent import Descent
from jdeq.joint.method import Context

PyTree = Any

_SETTLED = 0.1
"""A gradient has settled once an iteration at constant x changes it by less than this fraction of
the projected gradient."""

_LEAST_WAIT = 1
"""Iterations after which two gradients at the same x can be compared."""

_RETREAT = 0.25
"""Fraction that is left of a step on x that made things worse."""

_MOST_RETREATS = 3
"""Retreats in a row: the anchor was measured with an error, and may not be worth going back to."""

_TOLERATED_RISE = 0.01
"""Relative rise of the objective that a step on x may cost while it lowers the gradient."""


class Anchor(NamedTuple):
    """Where the current step on x set out from.

    Attributes:
        x: the input there.
        gradient: the settled gradient there, like x.
        objective: ``[B]``.
        stationarity: ``[B]``.
    """

    x: PyTree
    gradient: PyTree
    objective: Array
    stationarity: Array


class PolishedMemory(NamedTuple):
    """What the two phases remember.

    Attributes:
        descent: memory of the descent method.
        quasi_newton: state of the L-BFGS transformation, one a problem.
        anchor: where the current step on x set out from.
        last_gradient: gradient of the previous iteration, like x.
        waited: iterations since x moved, int32 ``[B]``.
        retreats: retreats since the last step ahead, int32 ``[B]``.
    """

    descent: PyTree
    quasi_newton: PyTree
    anchor: Anchor
    last_gradient: PyTree
    waited: Array
    retreats: Array


@dataclasses.dataclass(frozen=True)
class Polished:
    """Descent for a share of the steps, then a quasi-Newton polish to any tolerance.

    Descent finds the basin, whatever the units of the objective, but a decaying step ends short of
    a tight tolerance. The polish goes on with state and adjoint as before and moves x only where
    the gradient has settled, that is, changes by less than a tenth of the projected gradient in an
    iteration at constant x: an L-BFGS step without a constraint, a projected gradient step of
    Barzilai and Borwein's length with one, no longer than ``1 + ||x||``. A step that makes things
    worse is taken back to a quarter. Each x so costs a few iterations, the gradient's relative
    error stays bounded, and convergence is locally linear or faster. Windows hold x alone, never
    the state.

    Attributes:
        descent: the first phase.
        descent_share: share of ``max_steps`` that descent gets, or of ``step_budget`` where that
            is less, in (0, 1].
        window: number of L-BFGS pairs, at least 1.

    Raises:
        TypeError: if ``descent`` is not a ``Descent``.
        ValueError: if ``descent_share`` or ``window`` is out of range.
    """

    descent: Descent = Descent()
    descent_share: float = 0.15
    window: int = 20

    def __post_init__(self) -> None:
        _options.check_instance(
            "Polished", "descent", self.descent, Descent, "jdeq.joint.Descent()"
        )
        _options.check_fraction("Polished", "descent_share", self.descent_share)
        _options.check_count("Polished", "window", self.window)

    def _switch(self, max_steps: int | Array) -> int | Array:
        # In one precision, so that a budget switches where the same limit does.
        share = np.float32(self.descent_share)
        if isinstance(max_steps, int):
            return max(1, round(float(share * np.float32(max_steps))))
        return jnp.maximum(1, jnp.round(share * max_steps.astype(share.dtype)).astype(jnp.int32))

    def _lbfgs(self) -> optax.GradientTransformation:
        return optax.scale_by_lbfgs(memory_size=self.window)

    def ahead(self, z: PyTree, fz: PyTree) -> PyTree:
        """Where the descent's state goes next."""
        return self.descent.ahead(z, fz)

    def init(self, state: AugmentedState, max_steps: int | Array) -> PolishedMemory:
        """Memory of both phases."""
        infinite = jnp.full_like(_tree.norm(state.x), jnp.inf)
        zeros = _tree.zeros_like(state.x)
        none = jnp.zeros(infinite.shape, jnp.int32)
        return PolishedMemory(
            descent=self.descent.init(state, self._switch(max_steps)),
            quasi_newton=jax.vmap(self._lbfgs().init)(state.x),
            anchor=Anchor(state.x, zeros, infinite, infinite),
            last_gradient=zeros,
            waited=none,
            retreats=none,
        )

    def step(
        self,
        state: AugmentedState,
        evaluation: Evaluation,
        residual: KKTResidual,
        memory: PolishedMemory,
        context: Context,
    ) -> tuple[AugmentedState, PolishedMemory]:
        """A step of the phase that ``context.k`` is in."""
        switch = self._switch(context.max_steps)

        def descend(memory: PolishedMemory) -> tuple[PyTree, PolishedMemory]:
            phase = context._replace(max_steps=switch)
            x, descent = self.descent.move(state.x, evaluation.gradient, memory.descent, phase)
            return x, memory._replace(descent=descent)

        def polish(memory: PolishedMemory) -> tuple[PyTree, PolishedMemory]:
            return self._polish(state.x, evaluation, residual, memory, context)

        x, memory = lax.cond(context.k < switch, descend, polish, memory)
        return self.descent.track(state, evaluation, x), memory

    def _polish(
        self,
        x: PyTree,
        evaluation: Evaluation,
        residual: KKTResidual,
        memory: PolishedMemory,
        context: Context,
    ) -> tuple[PyTree, PolishedMemory]:
        gradient, anchor = evaluation.gradient, memory.anchor
        objective = evaluation.objective.astype(anchor.objective.dtype)
        change = relative_length(
            x,
            _tree.subtract(gradient, memory.last_gradient),
            evaluation.objective,
            context.first_objective,
        )
        settled = memory.waited >= _LEAST_WAIT
        settled &= change <= _SETTLED * residual.stationarity
        worse = _is_worse(objective, residual.stationarity, anchor)
        worse &= memory.retreats < _MOST_RETREATS
        direction, quasi_newton = self._direction(x, gradient, memory, context)

        ahead = context.project(_tree.add(x, direction))
        back = context.project(_tree.relax(anchor.x, x, _RETREAT))
        forward, retreat = settled & ~worse, settled & worse
        here = Anchor(x, gradient, objective, residual.stationarity)
        memory = PolishedMemory(
            descent=memory.descent,
            quasi_newton=_tree.select(forward, quasi_newton, memory.quasi_newton),
            anchor=_tree.select(forward, here, anchor),
            last_gradient=gradient,
            waited=jnp.where(settled, 0, memory.waited + 1),
            retreats=jnp.where(forward, 0, memory.retreats + retreat),
        )
        return _tree.select(forward, ahead, _tree.select(retreat, back, x)), memory

    def _direction(
        self, x: PyTree, gradient: PyTree, memory: PolishedMemory, context: Context
    ) -> tuple[PyTree, PyTree]:
        """The step on x, always one of descent, and the quasi-Newton state after it."""
        spectral = _spectral_step(x, gradient, memory.anchor)
        if context.constrained:
            return _shorten(spectral, x), memory.quasi_newton
        update = jax.vmap(self._lbfgs().update)(gradient, memory.quasi_newton, x)
        # Sums over leaves of several dtypes come back in the widest of them.
        upwards, quasi_newton = _tree.cast_like(update, (x, memory.quasi_newton))
        newton = jax.tree.map(jnp.negative, upwards)
        usable = _tree.dot(newton, gradient) < 0
        # Without a pair yet, L-BFGS takes the gradient for a step, whatever its units.
        usable &= jnp.isfinite(_tree.norm(newton)) & (memory.quasi_newton.count > 0)
        return _shorten(_tree.select(usable, newton, spectral), x), quasi_newton


def _is_worse(objective: Array, stationarity: Array, anchor: Anchor) -> Array:
    """Whether a step on x is to be taken back: a little more objective only if more gradient too.

    Near the solution the objective's differences drown in the state's residual; far from it, a
    step onto a plateau lowers the gradient and is still a bad one.
    """
    allowed = anchor.objective + _TOLERATED_RISE * jnp.abs(anchor.objective)
    rises = objective > anchor.objective
    return (objective > allowed) | (rises & (stationarity > anchor.stationarity))


def _shorten(step: PyTree, x: PyTree) -> PyTree:
    """The step, no longer than ``1 + ||x||``."""
    length, longest = _tree.norm(step), 1 + _tree.norm(x)
    return _tree.scale(jnp.minimum(1, longest / jnp.maximum(length, longest)), step)


def _spectral_step(x: PyTree, gradient: PyTree, anchor: Anchor) -> PyTree:
    """``-(dx . dx / |dx . dg|) g`` (Barzilai and Borwein 1988), at first a hundredth of x."""
    dx = _tree.subtract(x, anchor.x)
    dg = _tree.subtract(gradient, anchor.gradient)
    square, curvature = _tree.dot(dx, dx), jnp.abs(_tree.dot(dx, dg))
    known = (square > 0) & (curvature > 0) & jnp.isfinite(anchor.objective)
    slope = _tree.norm(gradient)
    first = 0.01 * (1 + _tree.norm(x)) / jnp.where(slope > 0, slope, 1)
    length = jnp.where(known, square / jnp.where(known, curvature, 1), first)
    return _tree.scale(-length, gradient)
