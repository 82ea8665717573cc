"""The multiscale cell of MDEQ (Bai, Koltun and Kolter, 2020, section 3) with any branches.

A state holds one feature map per resolution. Each branch has a residual block; then every branch
receives the sum of all of them, strided convolutions going down in resolution and 1x1
convolutions with nearest upsampling going up. The cell ends in a normalisation, so that the norm
of a state is about the square root of its size.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdeq.nn.conv import Conv, Precision
from jdeq.nn.dropout import apply_mask
from jdeq.nn.norm import GroupNorm, check_groups
from jdeq.nn.resize import nearest_upsample

State = tuple[Array, ...]


class ResidualBlock(nnx.Module):
    """`GN(relu(z + GN(drop(conv(relu(film(GN(conv(z)))))) + injection)))`, width C to eC to C.

    Args:
        width: channels C.
        expansion: e.
        groups: groups of the three normalisations.
        weight_norm: whether the convolutions are weight-normalised.
        context: features of the context vector that modulates the block (feature-wise scale and
            shift after the first normalisation, FiLM: Perez et al., 2018); 0 for none.
        kernel_init: initialiser of the convolutions' kernels.
        precision: of the convolutions' products.
        param_dtype: dtype of the parameters.
        rngs: source of the parameters' keys.
    """

    def __init__(
        self,
        width: int,
        *,
        expansion: int,
        groups: int,
        weight_norm: bool,
        context: int,
        kernel_init: nnx.initializers.Initializer,
        precision: Precision,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        conv: dict[str, Any] = {
            "weight_norm": weight_norm,
            "kernel_init": kernel_init,
            "precision": precision,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        hidden = expansion * width
        self.widen = Conv(width, hidden, 3, **conv)
        self.hidden_norm = GroupNorm(hidden, groups, param_dtype=param_dtype)
        self.film = (
            nnx.Linear(context, 2 * hidden, param_dtype=param_dtype, rngs=rngs) if context else None
        )
        self.narrow = Conv(hidden, width, 3, **conv)
        self.injected_norm = GroupNorm(width, groups, param_dtype=param_dtype)
        self.norm = GroupNorm(width, groups, param_dtype=param_dtype)

    def __call__(
        self,
        z: Array,
        injection: Array | None = None,
        mask: Array | None = None,
        context: Array | None = None,
    ) -> Array:
        """Maps `[B, H, W, C]`; mask `[B, C]` and context `[B, features]` are optional.

        Whatever their dtypes, the result is of the dtype of `z`.
        """
        hidden = self.hidden_norm(self.widen(z))
        if self.film is not None and context is not None:
            modulation = self.film(context).astype(hidden.dtype)[:, None, None, :]
            scale, shift = jnp.split(modulation, 2, axis=-1)
            hidden = hidden * scale + shift
        out = apply_mask(self.narrow(jax.nn.relu(hidden)), mask)
        out = out if injection is None else out + injection.astype(out.dtype)
        return self.norm(jax.nn.relu(self.injected_norm(out) + z))


class Downsample(nnx.Module):
    """Strided 3x3 convolutions, each normalised, ReLU between; halves the size `steps` times.

    The width is kept until the last convolution.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        steps: int,
        *,
        groups: int,
        kernel_init: nnx.initializers.Initializer,
        precision: Precision,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        conv: dict[str, Any] = {
            "kernel_init": kernel_init,
            "precision": precision,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        widths = [*[in_width] * steps, out_width]
        self.convs = nnx.List([Conv(a, b, 3, stride=2, **conv) for a, b in pairwise(widths)])
        self.norms = nnx.List(
            [GroupNorm(width, groups, param_dtype=param_dtype) for width in widths[1:]]
        )

    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, C]` to a map of `ceil(H / 2^steps)` rows, columns likewise."""
        last = len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            x = x if i == last else jax.nn.relu(x)
        return x


class Upsample(nnx.Module):
    """1x1 convolution, normalisation, nearest upsampling to a given size."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        steps: int,
        *,
        groups: int,
        kernel_init: nnx.initializers.Initializer,
        precision: Precision,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            in_width,
            out_width,
            1,
            kernel_init=kernel_init,
            precision=precision,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = GroupNorm(out_width, groups, param_dtype=param_dtype)
        self.factor = 2**steps

    def __call__(self, x: Array, size: tuple[int, int]) -> Array:
        """Maps `[B, h, w, C]` to `[B, *size, C']`, `size` at most `2^steps` times `(h, w)`."""
        return nearest_upsample(self.norm(self.conv(x)), self.factor)[:, : size[0], : size[1]]


class MultiscaleCell(nnx.Module):
    """One MDEQ layer on a tuple of feature maps, the finest first, each half the size before.

    Branch i: a `ResidualBlock`; fusion, the sum over branches j of its own block's output, of
    `Downsample` for finer j and `Upsample` for coarser j; then ReLU, a 1x1 convolution and a
    normalisation.

    Args:
        widths: channels of the branches, finest first.
        expansion: widening inside the residual blocks.
        groups: groups of the blocks' and the final normalisations; divides every width.
        fusion_groups: groups of the fusion's normalisations; divides every width if there are
            several branches.
        weight_norm: whether the convolutions outside the fusion are weight-normalised.
        kernel_init: initialiser of the convolutions' kernels; normal of deviation 0.01 by default,
            as published. The normalisations undo its scale except beside the injection.
        state_scale: scale at which the final normalisation starts. Below 1 the state counts for
            less beside the injection, and an untrained cell with injections of unit variance in
            every branch contracts (at 0.5, say; at 1 it usually does not).
        context: features of the context vector; an equal part goes to each branch's FiLM
            modulation. 0 for none.
        precision: of the convolutions' products, see `jdeq.nn.conv2d`.
        param_dtype: dtype of the parameters.
        rngs: source of the parameters' keys.

    Raises:
        ValueError: at construction, if a width is not divisible as asked for, or the context does
            not divide among the branches.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        expansion: int = 5,
        groups: int = 4,
        fusion_groups: int = 8,
        weight_norm: bool = True,
        kernel_init: nnx.initializers.Initializer | None = None,
        state_scale: float = 1.0,
        context: int = 0,
        precision: Precision = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.widths = tuple(widths)
        self.context = context
        _check_widths(self.widths, groups, fusion_groups, context)
        shared: dict[str, Any] = {
            "kernel_init": kernel_init or nnx.initializers.normal(0.01),
            "precision": precision,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.blocks = nnx.List(
            [
                ResidualBlock(
                    width,
                    expansion=expansion,
                    groups=groups,
                    weight_norm=weight_norm,
                    context=context // len(self.widths),
                    **shared,
                )
                for width in self.widths
            ]
        )
        # Keyed by source and target branch.
        pairs = [(j, i) for i in range(len(self.widths)) for j in range(len(self.widths))]
        self.down = nnx.Dict(
            {
                f"{j}_to_{i}": Downsample(
                    self.widths[j], self.widths[i], i - j, groups=fusion_groups, **shared
                )
                for j, i in pairs
                if j < i
            }
        )
        self.up = nnx.Dict(
            {
                f"{j}_to_{i}": Upsample(
                    self.widths[j], self.widths[i], j - i, groups=fusion_groups, **shared
                )
                for j, i in pairs
                if j > i
            }
        )
        self.convs = nnx.List(
            [Conv(width, width, 1, weight_norm=weight_norm, **shared) for width in self.widths]
        )
        self.norms = nnx.List(
            [
                GroupNorm(width, groups, initial_scale=state_scale, param_dtype=param_dtype)
                for width in self.widths
            ]
        )

    def __call__(
        self,
        z: State,
        injections: Sequence[Array | None],
        masks: Sequence[Array | None] | None = None,
        context: Array | None = None,
    ) -> State:
        """Evaluates the cell.

        Args:
            z: state, one `[B, H_i, W_i, C_i]` a branch, `H_{i+1} = ceil(H_i / 2)`.
            injections: what is added in each branch's block, of the branch's shape; None adds
                nothing.
            masks: dropout masks `[B, C_i]` from `variational_masks`; None drops nothing.
            context: `[B, features]`, if the cell was built with a context.

        Returns:
            The next state, of the same shapes and dtypes: the cell computes in those of `z`.
        """
        count = len(self.widths)
        if (context is None) == bool(self.context):
            given = "none" if context is None else f"one of shape {context.shape}"
            raise ValueError(
                f"MultiscaleCell was built with context={self.context} and got {given}: give a "
                "context vector exactly where the cell was built for one."
            )
        masks = (None,) * count if masks is None else masks
        contexts = (None,) * count if context is None else jnp.split(context, count, axis=-1)
        parts = zip(self.blocks, z, injections, masks, contexts, strict=True)
        blocks = [
            block(state, injection, mask, part) for block, state, injection, mask, part in parts
        ]
        return tuple(
            norm(conv(jax.nn.relu(self._fuse(blocks, i))))
            for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True))
        )

    def _fuse(self, blocks: Sequence[Array], i: int) -> Array:
        """What branch i receives from all branches."""
        total = blocks[i]
        _, height, width, _ = total.shape
        for j, block in enumerate(blocks):
            if j < i:
                total = total + self.down[f"{j}_to_{i}"](block)
            elif j > i:
                total = total + self.up[f"{j}_to_{i}"](block, (height, width))
        return total

    def shapes(self, batch: int, size: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of a state for `batch` problems whose finest branch is `size` = `(H, W)`."""
        shapes = []
        for width in self.widths:
            shapes.append((batch, *size, width))
            size = (-(-size[0] // 2), -(-size[1] // 2))
        return tuple(shapes)


def _check_widths(widths: tuple[int, ...], groups: int, fusion_groups: int, context: int) -> None:
    if not widths:
        raise ValueError("MultiscaleCell got no widths: give the channels of each branch.")
    for width in widths:
        check_groups(width, groups)
        if len(widths) > 1:
            check_groups(width, fusion_groups)
    if context % len(widths):
        raise ValueError(
            f"MultiscaleCell got a context of {context} features for {len(widths)} branches: each "
            "branch takes an equal part, so give a multiple of the number of branches."
        )
