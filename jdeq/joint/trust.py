"""How far the gradients of a joint solve may be off because its point is not quite a KKT point."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jdeq import _options, _tree
from jdeq.adjoints import base
from jdeq.solution import Solution


class HypergradientError(NamedTuple):
    """Estimated relative errors of gradients with respect to the parameters, ``[B]`` each.

    Attributes:
        envelope: of the envelope gradient (``input_value``).
        state_implicit: of ``StateImplicit``, for an outer loss that is a multiple of the inner one.
    """

    envelope: Array
    state_implicit: Array


class Trust(NamedTuple):
    """Whether gradients are within the error asked for, bool ``[B]`` each.

    Attributes:
        envelope: the envelope gradient (``input_value``).
        state_implicit: ``StateImplicit``, for an outer loss that is a multiple of the inner one.
    """

    envelope: Array
    state_implicit: Array


def hypergradient_error(solution: Solution) -> HypergradientError:
    """Estimates the relative error of each problem's gradients from its KKT residuals.

    Both gradients are partial derivatives of the Lagrangian ``L = l + mu . (f - z)``, taken at
    ``s = (z, x, mu)`` in place of the KKT point ``s*``. To first order they are off by

        d2L/dtheta ds (s - s*),        s - s* = -(I - dF/ds)^-1 (F(s) - s),

    which is of the order of the residuals of the augmented map F, each in its own units:

        envelope        ||f - z|| / ||z|| + ||A - mu|| / ||mu|| + stationarity
        state-implicit  ||f - z|| / ||z|| + stationarity

    with ``A`` and the stationarity of ``KKTResidual``. ``StateImplicit`` solves for its own
    adjoint, so that the residual of mu does not matter; what it neglects, ``g . dx*/dtheta``, is of
    the order of the stationarity. Where its outer loss is not the inner one this neglect does not
    vanish at a KKT point either, and only ``KKTImplicit`` is a gradient.

    The constants left out are those of the KKT system: the error may be larger by the condition
    number of the objective in x, and by ``1 / (1 - radius)`` of the spectral radius of ``df/dz``;
    ``jdeq.diagnose`` measures both. On linear-quadratic problems of condition number 5 and radius
    0.5 the estimate is within a factor of five of the error, from 1 down to 1e-8; up to condition
    number 70 and radius 0.97 the error was at most 15 times the estimate.

    Args:
        solution: of ``joint_solve``, ``input_value``, ``best_of_starts`` or ``nested_solve``.

    Returns:
        The estimates, constants to autodiff; infinity for problems that diverged or were not
        finite.
    """
    z, _, mu = solution.value
    residual = solution.residual
    state = _ratio(residual.state, _tree.norm(z)) + residual.stationarity
    adjoint = _ratio(residual.adjoint, _tree.norm(mu))
    bad = base.failed(solution.result)
    return HypergradientError(
        *(lax.stop_gradient(jnp.where(bad, jnp.inf, e)) for e in (state + adjoint, state))
    )


def trust(solution: Solution, rtol: float = 0.1) -> Trust:
    """Whether each problem's gradients are within ``rtol`` of the true ones, as far as is known.

    Args:
        solution: see ``hypergradient_error``, whose estimates are compared with ``rtol``.
        rtol: relative error that is acceptable, at least 0; may be traced.

    Returns:
        One flag a problem for each gradient.

    Raises:
        ValueError: if ``rtol`` is no number of at least 0.
    """
    _options.check_tolerance("trust", "rtol", rtol)
    error = hypergradient_error(solution)
    return Trust(error.envelope <= rtol, error.state_implicit <= rtol)


def _ratio(residual: Array, size: Array) -> Array:
    """``residual / size``: zero where both are, infinite where only the size is."""
    unbounded = jnp.where(residual > 0, jnp.inf, 0).astype(residual.dtype)
    return jnp.where(size > 0, residual / jnp.where(size > 0, size, 1), unbounded)
