"""The fixed-point solvers of jaxopt as solvers of jdeq."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdeq import _tree

PyTree = Any

_OF_A_MAP = ("FixedPointIteration", "AndersonAcceleration")
_OF_A_ROOT = ("Broyden",)

_DEFAULTS: dict[str, dict[str, Any]] = {"Broyden": {"history_size": 10, "stepsize": 1.0}}
"""Where jaxopt's own are no use here: its history is as long as its step limit, and its step is
found by a line search."""

_NOT_HERE = {
    "fixed_point_fun": "the map is the one that is solved for",
    "fun": "the map is the one that is solved for",
    "maxiter": "pass max_steps to jdeq.deq or jdeq.fixed_point",
    "tol": "pass rtol and atol to jdeq.deq or jdeq.fixed_point",
    "implicit_diff": "pass adjoint to jdeq.deq or jdeq.fixed_point",
    "implicit_diff_solve": "pass adjoint to jdeq.deq or jdeq.fixed_point",
    "has_aux": "the map returns the state alone",
    "verbose": "pass history to jdeq.deq or jdeq.fixed_point",
    "jit": "solves are always compiled",
    "unroll": "the loop is jdeq's",
}


class FromJaxoptMemory(NamedTuple):
    """Where jaxopt's solver stands, every leaf ``[B, ...]``.

    Attributes:
        params: what its next ``update`` takes as parameters.
        state: what its next ``update`` takes as state.
    """

    params: PyTree
    state: PyTree


@dataclasses.dataclass(frozen=True)
class FromJaxopt:
    """A fixed-point solver of jaxopt (Blondel et al. 2022), one solve a problem.

        jdeq.deq(cell, params, x, z0,
                 solver=FromJaxopt(jaxopt.AndersonAcceleration, {"history_size": 8}))

    Takes ``jaxopt.FixedPointIteration``, ``jaxopt.AndersonAcceleration`` and ``jaxopt.Broyden``
    (on the root of ``z - f(z)``), with the options that make their steps. jdeq owns the loop, so
    that stopping, failures, step counts and gradients are those of every other solver: each step
    takes one evaluation of the map, on the whole batch. jaxopt computes in JAX's default
    floating dtype; states keep theirs. Nothing is taken over from the memory of an earlier call.

    jaxopt is no longer maintained by its authors. It is imported when such a solver is made.

    Attributes:
        method: a solver class of jaxopt.
        options: its options, a mapping or pairs of name and value; kept as sorted pairs. Broyden's
            ``stepsize`` is 1 by default, and its ``history_size`` 10.

    Raises:
        ImportError: if jaxopt is not installed.
        TypeError: if ``method`` is not one of the classes above, an option is not known to it or
            cannot be hashed.
        ValueError: if an option is decided by ``jdeq.deq`` instead, asks for a line search, or is
            refused by jaxopt.
    """

    method: type
    options: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()

    def __post_init__(self) -> None:
        name = _check_method(self.method)
        given = dict(self.options)
        known = [field.name for field in dataclasses.fields(self.method)]
        for option, value in given.items():
            _check_option(name, option, value, known)
        if name in _OF_A_ROOT:
            _check_step(given.get("stepsize", 1.0))
        object.__setattr__(self, "options", tuple(sorted(given.items())))
        self._build(lambda z: z)  # jaxopt refuses what it does not take

    def init(self, z: PyTree) -> FromJaxoptMemory:
        """The state of jaxopt's solver at ``z``; nothing is evaluated."""
        params = _in_default_dtype(z)
        state = jax.vmap(lambda p: self._build(lambda z: z).init_state(p))(params)
        return FromJaxoptMemory(params, state)

    def step(
        self, z: PyTree, fz: PyTree, memory: FromJaxoptMemory, k: Array
    ) -> tuple[PyTree, FromJaxoptMemory]:
        """The point at which jaxopt's solver asks for the map next; it begins anew at step 0."""
        take = _step_of_root if self.method.__name__ in _OF_A_ROOT else _step_of_map
        z_next, params, state = jax.vmap(lambda *a: take(self._build, k == 0, *a))(
            _in_default_dtype(z), _in_default_dtype(fz), *memory
        )
        params, state = _tree.cast_like((params, state), (memory.params, memory.state))
        return _tree.cast_like(z_next, z), FromJaxoptMemory(params, state)

    def _build(self, function: Callable[[PyTree], PyTree]) -> Any:
        name = self.method.__name__
        options = {**_DEFAULTS.get(name, {}), **dict(self.options)}
        return self.method(function, **options, jit=False)


Step = tuple[PyTree, PyTree, PyTree]
"""The next iterate, and the parameters and the state of the next ``update``."""


def _step_of_map(
    build: Callable, first: Array, z: PyTree, fz: PyTree, params: PyTree, state: PyTree
) -> Step:
    """For solvers whose ``update`` evaluates the map once, at a point that it chooses first.

    That point is the iterate ``z`` here: the value is known when ``update`` asks for it, and where
    the next ``update`` will ask is seen by giving it the identity for the map.
    """
    solver = build(lambda point: point)
    params, state = _choose(first, (z, solver.init_state(z)), (params, state))
    params, state = build(lambda _: fz).update(params, state)
    return solver.update(params, state)[0], params, state


def _step_of_root(
    build: Callable, first: Array, z: PyTree, fz: PyTree, params: PyTree, state: PyTree
) -> Step:
    """For solvers whose ``update`` chooses the next point from a known value, then evaluates it.

    The update that led to ``z`` is completed with the value there; the next one is made without.
    """
    value = _tree.subtract(z, fz)
    # The secant update divides by the change of the value. Where there is none, since the problem
    # has just begun or stands still, harmless numbers keep NaN out of the gradients.
    still = [
        jnp.all(a == b)
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(state.value), strict=True)
    ]
    hold = first | jnp.all(jnp.stack(still))
    ones = jax.tree.map(jnp.ones_like, z)
    harmless = build(lambda _: ones).init_state(z)
    before = _choose(hold, harmless, state)
    after = jax.tree.map(lambda v: jnp.where(hold, -1, v), value)
    moved = build(lambda _: after).update(params, before)[1]

    solver = build(lambda _: value)
    state = _choose(first, solver.init_state(z), _choose(hold, state, moved))
    return solver.update(z, state)[0], z, state


def _choose(condition: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    return jax.tree.map(lambda t, f: jnp.where(condition, t, f), on_true, on_false)


def _in_default_dtype(tree: PyTree) -> PyTree:
    """The dtype of some of jaxopt's own arrays, whatever that of the parameters."""
    dtype = jnp.result_type(float)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def _check_method(method: Any) -> str:
    try:
        import jaxopt
    except ImportError as error:
        raise ImportError(
            "FromJaxopt: jaxopt is not installed, but its solvers are asked for; pip install "
            "jaxopt, or take jdeq.solvers.Anderson()."
        ) from error
    names = _OF_A_MAP + _OF_A_ROOT
    if not any(method is getattr(jaxopt, name) for name in names):
        raise TypeError(
            f"FromJaxopt: method={method!r} was given, but one of the classes "
            f"{', '.join(f'jaxopt.{name}' for name in names)} is expected; its options follow as a "
            f"mapping."
        )
    return method.__name__


def _check_option(name: str, option: str, value: Any, known: list[str]) -> None:
    if option in _NOT_HERE:
        raise ValueError(
            f"FromJaxopt: option {option}={value!r} of {name} was given, but it is not decided "
            f"here: {_NOT_HERE[option]}."
        )
    if option not in known:
        possible = ", ".join(field for field in known if field not in _NOT_HERE)
        raise TypeError(
            f"FromJaxopt: option {option}={value!r} was given, but {name} has no such option; it "
            f"takes {possible or 'none'}."
        )
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"FromJaxopt: option {option} is a {type(value).__name__}, but options are compared by "
            f"value and so must be hashable; pass a Python number."
        ) from None


def _check_step(stepsize: Any) -> None:
    if not callable(stepsize) and stepsize <= 0:
        raise ValueError(
            f"FromJaxopt: option stepsize={stepsize!r} was given, but a number above 0 or a "
            f"function of the step is expected, since jaxopt's line search evaluates the map "
            f"uncounted; take jdeq.solvers.NewtonKrylov() for a method that watches its steps."
        )
