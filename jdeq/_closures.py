"""Makes functions over captured arrays pure, so that custom rules see everything they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

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
            that draws random numbers does.
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
        raise
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
