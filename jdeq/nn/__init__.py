"""Flax NNX modules for equilibrium cells: fast in loops, differentiable to any order."""

from jdeq.nn.contraction import limit_spectral_norm, spectral_norm
from jdeq.nn.conv import Conv, conv2d, fold_weight_norm
from jdeq.nn.dropout import apply_mask, variational_masks
from jdeq.nn.layer import DEQ
from jdeq.nn.monotone import MonotoneCell
from jdeq.nn.multiscale import MultiscaleCell
from jdeq.nn.norm import GroupNorm, group_norm
from jdeq.nn.resize import bilinear_upsample, nearest_upsample

__all__ = [
    "DEQ",
    "Conv",
    "GroupNorm",
    "MonotoneCell",
    "MultiscaleCell",
    "apply_mask",
    "bilinear_upsample",
    "conv2d",
    "fold_weight_norm",
    "group_norm",
    "limit_spectral_norm",
    "nearest_upsample",
    "spectral_norm",
    "variational_masks",
]
