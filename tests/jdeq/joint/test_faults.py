"""What may be wrong with one problem of a batch, and what becomes of it and of its neighbours."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdeq
from jdeq.adjoints import KKTImplicit, StateImplicit
from jdeq.joint import Accelerated, Descent, Polished
from jdeq.solution import Result

B, SICK = 3, 1
OTHERS = np.array([0, 2])


def cell(params, z, x, data):
    return data["rate"] * z + jnp.sum(x, 1, keepdims=True) * params + data["square"] * (z**2 + 1)


def objective(params, z, x, target, data):
    distance = 0.5 * (z[:, 0] - target) ** 2
    penalty = 0.5 * data["weight"] * jnp.sum(x**2, 1)
    return distance + penalty - data["cubic"] * jnp.sum(x**3 + x, 1)


def into_ball(x, data):
    return jdeq.projections.l2_ball(x, data["radius"])


CAGED = jdeq.InputProblem(cell, objective, into_ball)
FREE = jdeq.InputProblem(cell, objective)

METHODS = {
    "polished": Polished(),
    "descent": Descent(optax.sgd(0.1)),
    "accelerated": Accelerated(step_size=0.1),
}


def healthy():
    """One state and two inputs that do the same, told apart by a penalty alone."""
    return {
        "target": jnp.array([1.0, -0.5, 2.0]),
        "x0": jnp.full((B, 2), 0.1),
        "z0": jnp.zeros((B, 1)),
        "data": {
            "rate": jnp.array([[0.5], [0.3], [0.4]]),
            "weight": jnp.full(B, 0.5),
            "square": jnp.zeros((B, 1)),
            "cubic": jnp.zeros(B),
            "radius": jnp.array([0.5, 0.4, 100.0]),
        },
    }


def fall_ill(**changes):
    """The healthy problems with some numbers of the sick one changed."""
    given = healthy()
    for name, value in changes.items():
        where = given if name in given else given["data"]
        where[name] = where[name].at[SICK].set(value)
    return given


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(problem, method, target, x0, z0, data):
    return jdeq.joint_solve(
        problem,
        jnp.ones(()),
        target,
        x0,
        z0,
        data=data,
        method=METHODS[method],
        rtol=1e-6,
        max_steps=1000,
        history=lambda state: state.x,
    )


FAULTS = {
    "NaN target": (CAGED, {"target": jnp.nan}, Result.non_finite),
    "infinite target": (CAGED, {"target": jnp.inf}, Result.non_finite),
    "NaN start of the input": (CAGED, {"x0": jnp.nan}, Result.non_finite),
    # Neither has a KKT point; where an unstable one exists, Anderson's method may well find it.
    "exploding cell": (CAGED, {"square": 1.0}, Result.diverged),
    "unbounded objective": (FREE, {"cubic": 5.0}, Result.diverged),
    "zero gradient at the start": (
        CAGED,
        {"target": 0.0, "x0": 0.0, "z0": 0.0},
        Result.converged,
    ),
    "zero gradient at the start, unconstrained": (
        FREE,
        {"target": 0.0, "x0": 0.0, "z0": 0.0},
        Result.converged,
    ),
    "radius zero": (CAGED, {"radius": 0.0}, Result.converged),
    "infeasible start": (CAGED, {"x0": 1e4}, Result.converged),
    "singular Hessian": (FREE, {"weight": 0.0}, Result.converged),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_stays_where_it_is(fault, method):
    """Its code is right, its iterate feasible and finite; its neighbours keep every bit."""
    problem, changes, code = FAULTS[fault]
    clean, s = (solve(problem, method, **given) for given in (healthy(), fall_ill(**changes)))
    assert np.all(clean.result == Result.converged)
    assert s.result[SICK] == code, Result(int(s.result[SICK])).name
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[OTHERS], b[OTHERS]),
        (s.value, s.result, s.steps, s.residual, s.aux),
        (clean.value, clean.result, clean.steps, clean.residual, clean.aux),
    )
    if fault == "NaN start of the input":
        return  # there is no good iterate to keep
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(s.value))
    if problem is CAGED:
        radius = fall_ill(**changes)["data"]["radius"]
        run = np.concatenate([s.history.record[: s.steps[SICK]], s.value.x[None]])[:, SICK]
        assert np.all(np.linalg.norm(run, axis=1) <= radius[SICK] * (1 + 1e-12))


def test_the_answers_of_the_harmless_faults():
    """Converged is said of the right point, too."""
    for method in METHODS:
        zero = solve(CAGED, method, **fall_ill(target=0.0, x0=0.0, z0=0.0))
        for leaf in zero.value:
            np.testing.assert_array_equal(leaf[SICK], 0)
        point = solve(CAGED, method, **fall_ill(radius=0.0))
        np.testing.assert_array_equal(point.value.x[SICK], 0)
        near, far = solve(CAGED, method, **healthy()), solve(CAGED, method, **fall_ill(x0=1e4))
        np.testing.assert_allclose(far.value.x, near.value.x, atol=1e-5)
        # Of the line of minima that a singular Hessian leaves, some point.
        line = solve(FREE, method, **fall_ill(weight=0.0))
        np.testing.assert_allclose(np.sum(line.value.x[SICK]), -0.5 * (1 - 0.3), atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def backward(adjoint, target, x0, z0, data):
    """Gradient in the target, outcomes of the backward and of the forward solve."""
    weight = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.3, -0.2]])

    def loss(target, probe):
        s = jdeq.joint_solve(
            FREE,
            jnp.ones(()),
            target,
            x0,
            z0,
            data=data,
            adjoint=adjoint,
            rtol=1e-9,
            max_steps=1000,
            backward_probe=probe,
        )
        return jnp.sum(weight * s.value.x) + jnp.sum(s.value.z), s.result

    (bar, rows), result = jax.grad(loss, (0, 1), has_aux=True)(target, jnp.zeros((B, 3)))
    return bar, rows, result


@pytest.mark.parametrize(
    ("adjoint", "changes"),
    [
        (KKTImplicit(max_steps=5), {"weight": 0.0}),
        (KKTImplicit(max_steps=5), {"target": jnp.nan}),
        (KKTImplicit(max_steps=5), {"cubic": 5.0}),
        (StateImplicit(), {"target": jnp.nan}),
    ],
)
def test_in_the_backward_pass_a_fault_stays_where_it_is(adjoint, changes):
    """A singular KKT system is reported; failed problems give zero; neighbours keep every bit."""
    clean_bar, clean_rows, clean_result = backward(adjoint, **healthy())
    bar, rows, result = backward(adjoint, **fall_ill(**changes))
    assert np.all(clean_result == Result.converged)
    assert np.all(clean_rows[:, 2] == Result.converged)
    np.testing.assert_array_equal(bar[OTHERS], clean_bar[OTHERS])
    np.testing.assert_array_equal(rows[OTHERS], clean_rows[OTHERS])
    if "weight" in changes:
        assert result[SICK] == Result.converged
        assert rows[SICK, 2] != Result.converged
        assert rows[SICK, 0] > 1e-3
    else:
        assert result[SICK] in (Result.diverged, Result.non_finite)
        assert bar[SICK] == 0
