"""The explicit networks of the baselines."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdeq.nn import Conv, GroupNorm

_CHANNELS = 64
_LAYERS = 4
_HIDDEN = 40
_GROUPS = 8
_FIRST_TEMPERATURE = 8.0
_FIRST_STEP = 0.1


class Body(nnx.Module):
    """Features of examples, with the usual architectures (Finn et al., 2017, section 5).

    Images: four 3x3 convolutions of stride 2 and 64 channels, each normalised and rectified; the
    normalisation is by group, since statistics of a batch would let queries see each other.
    Numbers: two rectified layers of 40.
    """

    def __init__(self, shape: tuple[int, ...], *, rngs: nnx.Rngs):
        self.is_image = len(shape) == 3
        if not self.is_image:
            self.first = nnx.Linear(shape[0], _HIDDEN, rngs=rngs)
            self.second = nnx.Linear(_HIDDEN, _HIDDEN, rngs=rngs)
            self.width = _HIDDEN
            return
        height, width, channels = shape
        widths = [channels, *[_CHANNELS] * _LAYERS]
        self.convs = nnx.List([Conv(a, b, 3, stride=2, rngs=rngs) for a, b in pairwise(widths)])
        self.norms = nnx.List([GroupNorm(_CHANNELS, _GROUPS) for _ in range(_LAYERS)])
        for _ in range(_LAYERS):
            height, width = -(-height // 2), -(-width // 2)
        self.width = height * width * _CHANNELS

    def __call__(self, inputs: Array) -> Array:
        """Features [M, width] of examples [M, ...]."""
        if not self.is_image:
            return jax.nn.relu(self.second(jax.nn.relu(self.first(inputs))))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            inputs = jax.nn.relu(norm(conv(inputs)))
        return inputs.reshape(len(inputs), -1)


class Classifier(nnx.Module):
    """A body, and what the methods learn besides it.

    Every class starts with the same row of the head, so that one model serves tasks of any N, and
    the order of the classes does not matter (Ye and Chao, 2022).
    """

    def __init__(self, body: Body):
        self.body = body
        self.row = nnx.Param(jnp.zeros(body.width))
        self.bias = nnx.Param(jnp.zeros(()))
        self.log_temperature = nnx.Param(jnp.log(jnp.float32(_FIRST_TEMPERATURE)))
        self.log_steps = nnx.Param(jnp.full(2, jnp.log(_FIRST_STEP), jnp.float32))


class Adapted(nnx.Module):
    """A task's own network: a body and a head of N rows."""

    def __init__(self, model: Classifier, ways: int):
        self.body = model.body
        self.kernel = nnx.Param(jnp.broadcast_to(model.row[...], (ways, model.body.width)))
        self.bias = nnx.Param(jnp.broadcast_to(model.bias[...], (ways,)))

    def __call__(self, inputs: Array) -> Array:
        """Outputs [M, ways]."""
        return self.body(inputs) @ self.kernel[...].T + self.bias[...]


def start(graph: nnx.GraphDef, params: nnx.State, ways: int) -> tuple[nnx.GraphDef, nnx.State]:
    """A task's network before it has seen the support, and its parameters."""
    return nnx.split(Adapted(nnx.merge(graph, params), ways))
