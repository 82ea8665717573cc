"""Cells with one equilibrium by construction: monotone operator equilibrium networks.

Winston and Kolter (2020) parametrise the recurrent matrix such that `I - W` is strongly monotone.
The equilibrium then exists, is unique and moves continuously with the input, for any values of
the parameters; and an operator splitting of the equation is a contraction, also where the plain
iteration `z <- relu(W z + U x + b)` diverges. The splitting is the cell here, so that any solver
may be tried, and plain Picard iteration converges always.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdeq._tree import accumulation_dtype

Prox = Callable[[Array, Array], Array]

_SQUARINGS = 5


def relu_prox(v: Array, step: Array) -> Array:
    """`relu(v)`: the projection on the nonnegative numbers, the same for every step."""
    del step
    return jax.nn.relu(v)


class MonotoneCell(nnx.Module):
    """Dense monotone cell: `z* = prox(W z* + U x + b)` with a strongly monotone `I - W`.

        W = (1 - m) I - A^T A + B - B^T,      <v, (I - W) v> >= m ||v||^2     for every v

    with any matrices `A` and `B` (Winston and Kolter, 2020). One evaluation is a step of one of
    the splittings of that equation, with `L >= ||I - W||_2`:

    - forward-backward: `z <- prox((1 - alpha) z + alpha (W z + U x + b))`, a contraction for
      `alpha < 2 m / L^2`; its factor at `alpha = m / L^2` is at most `sqrt(1 - m^2 / L^2)`;
    - Peaceman-Rachford, on `u` with `z = prox(u)`: `u <- 2 y - w` where `w = 2 z - u` and
      `(I + alpha (I - W)) y = w + alpha (U x + b)`, a contraction for every `alpha > 0`; its factor
      at `alpha = 1 / L` is at most `sqrt((L - m) / (L + m))`: far fewer iterations for one inverse
      a solve.

    The state of the solve is `z` or `u`; `output(state)` is `z*` in either case:

        layer = DEQ(MonotoneCell(784, 100, rngs=nnx.Rngs(0)))
        z = layer.cell.output(layer(x))

    `W`, `alpha` and the inverse are computed in the cell from the parameters alone, which XLA moves
    out of the loop of a solve. `alpha` changes the path to the equilibrium, not the equilibrium, so
    it is a constant to autodiff. State `[B, features]`, input `[B, in_features]`.

    Args:
        in_features: size of an input.
        features: size of a state, n.
        m: strong monotonicity, above 0. The smaller, the larger is the class of maps and the
            slower the guaranteed convergence.
        splitting: `"forward_backward"` or `"peaceman_rachford"`.
        alpha: step of the splitting; `m / L^2` or `1 / L` when None, from an upper bound of
            `||I - W||_2` that is at most a few percent above it. A larger one for forward-backward
            is often faster, but forfeits the guarantee from `2 m / L^2` on.
        prox: `prox(v, step)`, the proximal operator of `step` times a convex function, such as
            `lambda v, step: jnp.clip(v, -1, 1)`; the activation is that of step 1. Any other
            activation would have an equilibrium that moves with `alpha`.
        kernel_init: initialiser of `A`, `B` and `U`; LeCun normal by default.
        param_dtype: dtype of the parameters.
        rngs: source of the parameters' keys.

    Raises:
        ValueError: at construction, if a size is below one, `m` or `alpha` is not positive, or the
            splitting is not known.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        m: float = 0.1,
        splitting: Literal["forward_backward", "peaceman_rachford"] = "peaceman_rachford",
        alpha: float | None = None,
        prox: Prox = relu_prox,
        kernel_init: nnx.initializers.Initializer | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(in_features, features) < 1:
            raise ValueError(
                f"MonotoneCell got in_features={in_features}, features={features}: each must be at "
                "least 1."
            )
        if not m > 0 or (alpha is not None and not alpha > 0):
            raise ValueError(
                f"MonotoneCell got m={m}, alpha={alpha}: both must be above 0, since without "
                "strong monotonicity neither one equilibrium nor convergence is guaranteed."
            )
        if splitting not in ("forward_backward", "peaceman_rachford"):
            raise ValueError(
                f"MonotoneCell got splitting={splitting!r}: give 'forward_backward' or "
                "'peaceman_rachford'."
            )
        init = kernel_init or nnx.initializers.lecun_normal()
        self.symmetric = nnx.Param(init(rngs.params(), (features, features), param_dtype))
        self.skew = nnx.Param(init(rngs.params(), (features, features), param_dtype))
        self.injection = nnx.Param(init(rngs.params(), (in_features, features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.features = features
        self.m = m
        self.splitting = splitting
        self.alpha = alpha
        self.prox = prox

    def initial_state(self, batch: int) -> Array:
        """Zeros `[batch, features]` in the parameters' dtype."""
        return jnp.zeros((batch, self.features), self.bias[...].dtype)

    def weight(self) -> Array:
        """The recurrent matrix `W`, `[n, n]`, in float32 or better."""
        operator = self._operator()
        return jnp.eye(self.features, dtype=operator.dtype) - operator

    def step_size(self) -> Array:
        """The step `alpha` of the splitting, a scalar and a constant to autodiff."""
        operator = jax.lax.stop_gradient(self._operator())
        if self.alpha is not None:
            return jnp.asarray(self.alpha, operator.dtype)
        bound = _spectral_norm_bound(operator)
        return self.m / bound**2 if self.splitting == "forward_backward" else 1 / bound

    def contraction_bound(self) -> Array:
        """An upper bound of the cell's Lipschitz constant in its state, a scalar.

        With the step `alpha` and `L >= ||I - W||_2`: forward-backward
        `sqrt(1 - 2 alpha m + alpha^2 L^2)`, Peaceman-Rachford
        `sqrt(1 - 4 alpha m / (1 + 2 alpha m + alpha^2 L^2))`. Below one, Picard iteration gains
        at least this factor a step.
        """
        alpha, bound = self.step_size(), _spectral_norm_bound(self._operator())
        forward = 1 + (alpha * bound) ** 2
        drop = 2 * alpha * self.m
        if self.splitting == "forward_backward":
            return jnp.sqrt(forward - drop)
        return jnp.sqrt(1 - 2 * drop / (forward + drop))

    def output(self, state: Array) -> Array:
        """The network's state `z` of a state of the solve, `[B, features]`."""
        if self.splitting == "forward_backward":
            return state
        return self.prox(state, self.step_size().astype(state.dtype))

    def __call__(self, state: Array, x: Array) -> Array:
        """One step of the splitting, `[B, features]` to `[B, features]`."""
        dtype = state.dtype
        alpha = self.step_size()
        shift = (x @ self.injection[...] + self.bias[...]).astype(dtype) * alpha.astype(dtype)
        identity, operator = jnp.eye(self.features, dtype=alpha.dtype), self._operator()
        if self.splitting == "forward_backward":
            moved = state @ (identity - alpha * operator).T.astype(dtype)
            return self.prox(moved + shift, alpha.astype(dtype))
        # The inverse is well conditioned: its system has singular values from 1 to 1 + alpha L.
        resolvent = jnp.linalg.inv(identity + alpha * operator)
        reflected = 2 * self.output(state) - state
        return 2 * ((reflected + shift) @ resolvent.T.astype(dtype)) - reflected

    def _operator(self) -> Array:
        """`I - W`, without the cancellation of forming `W` first."""
        dtype = accumulation_dtype(self.skew[...].dtype)
        symmetric, skew = self.symmetric[...].astype(dtype), self.skew[...].astype(dtype)
        monotone = self.m * jnp.eye(self.features, dtype=dtype)
        return monotone + symmetric.T @ symmetric - skew + skew.T


def _spectral_norm_bound(kernel: Array) -> Array:
    """An upper bound of the largest singular value of a matrix, never below it but by rounding.

    With `G = K^T K` and `p = 2^5` it is `||G^p||_F^(1 / 2p)`, by repeated squaring: at most the
    factor `min(m, n)^(1 / 4p)` too large, which is 1.05 for 1,000 (power iteration, in contrast,
    approaches the norm from below).

    Args:
        kernel: `[m, n]`, floating, not zero.

    Returns:
        A scalar of the kernel's dtype.
    """
    gram = kernel.T @ kernel
    bound, power = jnp.ones((), kernel.dtype), 1.0
    for _ in range(_SQUARINGS):
        size = jnp.linalg.norm(gram)
        bound *= size**power
        gram = (gram / size) @ (gram / size)
        power /= 2
    return jnp.sqrt(bound * jnp.linalg.norm(gram) ** power)
