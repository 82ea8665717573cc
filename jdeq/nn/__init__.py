"""Flax NNX modules for equilibrium cells: fast in loops, differentiable to any order."""

from jdeq.nn.conv import Conv, conv2d, fold_weight_norm
from jdeq.nn.dropout import apply_mask, variational_masks
from jdeq.nn.multiscale import MultiscaleCell, nearest_upsample
from jdeq.nn.norm import GroupNorm, group_norm

__all__ = [
    "Conv",
    "GroupNorm",
    "MultiscaleCell",
    "apply_mask",
    "conv2d",
    "fold_weight_norm",
    "group_norm",
    "nearest_upsample",
    "variational_masks",
]
