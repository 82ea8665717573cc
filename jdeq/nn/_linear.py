"""A linear map that brings its own transpose, in every mode of differentiation.

XLA's CPU backend runs some operations many times slower in the form in which automatic
differentiation writes their transpose (see `jdeq.nn.conv` and `jdeq.nn.norm`). `jax.custom_vjp`
could replace those forms, but rules out forward mode and with it Hessians and Newton-Krylov
solves. Here a rule for the transpose is attached to a linear map instead: forward mode, reverse
mode, any nesting of the two and `vmap` all go through it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jdeq._shards import vary_alike

Arrays = tuple[Array, ...]
LinearFun = Callable[[Arrays, Arrays], Arrays]

linear_map_p = Primitive("jdeq_linear_map")
linear_map_p.multiple_results = True


def on_cpu() -> bool:
    """Whether the forms that are fast on XLA's CPU backend are to be used."""
    return jax.default_backend() == "cpu"


def linear_map(
    fun: LinearFun, transpose: LinearFun, residuals: Sequence[Array], operands: Sequence[Array]
) -> Arrays:
    """Evaluates `fun(residuals, operands)`, whose transpose is known to be `transpose`.

    Args:
        fun: linear in `operands`, for any `residuals`; differentiable by JAX in `residuals`.
        transpose: `transpose(residuals, cotangents)`, one result for each operand, of its shape
            and dtype; differentiable by JAX in `residuals`.
        residuals: arrays on which both may depend in any way.
        operands: floating point arrays.

    Returns:
        What `fun` returns: a tuple of arrays.
    """
    # `shard_map` asks of a primitive that its operands vary alike.
    arrays = vary_alike((*residuals, *operands))
    out = linear_map_p.bind(*arrays, fun=fun, transpose=transpose, n_residuals=len(residuals))
    return tuple(out)


def _evaluate(
    *arrays: Array, fun: LinearFun, transpose: LinearFun, n_residuals: int
) -> list[Array]:
    del transpose
    return list(fun(arrays[:n_residuals], arrays[n_residuals:]))


def _abstract(*avals: Any, **params: Any) -> list[Any]:
    return jax.make_jaxpr(lambda *arrays: _evaluate(*arrays, **params))(*avals).out_avals


def _jvp(
    primals: Arrays, tangents: Sequence[Any], **params: Any
) -> tuple[list[Array], list[Array]]:
    n_residuals, fun = params["n_residuals"], params["fun"]
    residuals, operands = primals[:n_residuals], primals[n_residuals:]
    out = linear_map_p.bind(*primals, **params)
    changes = []
    if not all(type(t) is ad.Zero for t in tangents[n_residuals:]):
        moved = map(ad.instantiate_zeros, tangents[n_residuals:])
        changes.append(linear_map_p.bind(*residuals, *moved, **params))
    active = [i for i in range(n_residuals) if type(tangents[i]) is not ad.Zero]
    if active:

        def of_active(*values: Array) -> list[Array]:
            filled = dict(enumerate(residuals)) | dict(zip(active, values, strict=True))
            return list(fun(tuple(filled[i] for i in range(n_residuals)), operands))

        changes.append(
            jax.jvp(of_active, [residuals[i] for i in active], [tangents[i] for i in active])[1]
        )
    return out, [sum(parts[1:], parts[0]) for parts in zip(*changes, strict=True)]


def _transpose(cotangents: Sequence[Any], *args: Any, **params: Any) -> list[Any]:
    n_residuals = params["n_residuals"]
    residuals, operands = args[:n_residuals], args[n_residuals:]
    results = linear_map_p.bind(
        *residuals,
        *map(ad.instantiate_zeros, cotangents),
        fun=params["transpose"],
        transpose=params["fun"],
        n_residuals=n_residuals,
    )
    unknown = map(ad.is_undefined_primal, operands)
    by_operand = [r if wanted else None for r, wanted in zip(results, unknown, strict=True)]
    return [None] * n_residuals + by_operand


def _batch(args: Arrays, dims: Sequence[Any], **params: Any) -> tuple[list[Array], list[int]]:
    n_residuals = params["n_residuals"]
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    residual_dims = tuple(dims[:n_residuals])
    # The transpose returns one batched result per operand, so that every operand is batched too.
    operands = tuple(
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args[n_residuals:], dims[n_residuals:], strict=True)
    )

    def batched(fun: LinearFun) -> LinearFun:
        return lambda residuals, values: jax.vmap(fun, in_axes=(residual_dims, 0), axis_size=size)(
            residuals, values
        )

    out = linear_map(
        batched(params["fun"]), batched(params["transpose"]), args[:n_residuals], operands
    )
    return list(out), [0] * len(out)


linear_map_p.def_impl(_evaluate)
linear_map_p.def_abstract_eval(_abstract)
ad.primitive_jvps[linear_map_p] = _jvp
ad.primitive_transposes[linear_map_p] = _transpose
batching.primitive_batchers[linear_map_p] = _batch
mlir.register_lowering(linear_map_p, mlir.lower_fun(_evaluate, multiple_results=True))
