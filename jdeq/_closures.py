"""Makes functions over captured arrays pure, so that custom rules see everything they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jdeq._shards import is_spread

PyTree = Any


def hoist(owner: str, name: str, function: Callable, *example: PyTree) -> tuple[Callable, list]:
    """Turns the arrays and tracers that ``function`` captures into an explicit argument.

    ``jax.closure_convert`` hoists floating-point tracers only; integers, booleans and keys, which a
    loop body or a custom rule cannot capture either, are hoisted here as well.

    Args:
        owner: the public function in whose name errors speak.
        name: the argument that ``function`` was passed as.
        function: any traceable function of ``example``.
        example: arguments of the dtypes and, but for the number of problems, shapes of later calls.

    Returns:
        ``pure`` and ``captured`` with ``pure(captured, *example) == function(*example)``.

    Raises:
        ValueError: if ``function`` changes the state of an object while it is traced, as a module
            that draws random numbers does, or captures an array of a mesh with explicit axes that
            it cannot be traced with.
    """
    try:
        jaxpr, out_shape = jax.make_jaxpr(function, return_shape=True)(*example)
    except Exception as error:
        if type(error).__name__ == "TraceContextError":
            raise ValueError(
                f"{owner}: {name} changes the state of a module while it is traced (a random "
                f"stream or a running statistic), but it must be pure and deterministic, since it "
                f"is evaluated many times within one solve; draw masks and noise beforehand and "
                f"pass them through data."
            ) from error
        if "context mesh" in str(error):
            raise _refusal_of_mesh(owner, name) from error
        raise
    if any(is_spread(aval.sharding) for aval in jaxpr.out_avals):
        # No argument is spread in this way: a solve of such has explicit axes no more.
        raise _refusal_of_mesh(owner, name)
    out_tree = jax.tree.structure(out_shape)
    place = {id(constant): i for i, constant in enumerate(jaxpr.consts)}

    def pure(captured: list, *args: PyTree) -> PyTree:
        leaves = jax.tree.leaves(args)
        closed, consts = jaxpr, captured
        if [v.aval.shape for v in jaxpr.jaxpr.invars] != [np.shape(leaf) for leaf in leaves]:
            # With problems left out: the traced program is one of fixed shapes.
            closed = jax.make_jaxpr(function)(*args)
            consts = [captured[place[id(c)]] if id(c) in place else c for c in closed.consts]
        flat = jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves)
        return jax.tree.unflatten(out_tree, flat)

    return pure, jaxpr.consts


def _refusal_of_mesh(owner: str, name: str) -> ValueError:
    return ValueError(
        f"{owner}: {name} captures an array that lies on a mesh with explicit axes, but a solve "
        f"leaves it to the compiler how its arrays are spread, and JAX refuses to mix the two; "
        f"pass it as an argument instead, such as params or data."
    )
