from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Broyden, Picard
from tests.jdeq import problems


def reference_path(f, z, steps, window, kind, mixing, damping):
    """Broyden's method on one problem, with explicit matrices."""
    H = -mixing * np.eye(len(z))
    path, g = [z], f(z) - z
    for k in range(steps):
        z_next = z - damping * H @ g
        g_next = f(z_next) - z_next
        path.append(z_next)
        if k % window == 0:
            H = -mixing * np.eye(len(z))
        s, y = z_next - z, g_next - g
        v = H.T @ s if kind == "good" else y
        H = H + np.outer(s - H @ y, v) / (v @ y)
        z, g = z_next, g_next
    return np.array(path)


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize(
    ("window", "mixing", "damping"), [(20, 1.0, 1.0), (3, 0.7, 0.8), (1, 1, 1)]
)
def test_takes_the_steps_of_the_textbook(kind, window, mixing, damping):
    p = problems.tanh()
    steps = 9
    solution = jdeq.deq(
        p.cell,
        p.params,
        p.x,
        p.z0,
        solver=Broyden(window, kind, mixing, damping),
        rtol=0.0,
        atol=0.0,
        max_steps=steps + 1,
        history=lambda z: z,
    )
    for i in range(problems.B):

        def f(z, i=i):
            return np.asarray(p.cell(p.params, z[None], p.x[i : i + 1])[0])

        path = reference_path(f, np.zeros(problems.N), steps, window, kind, mixing, damping)
        np.testing.assert_allclose(solution.history.record[:, i], path, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_solves_a_linear_system_in_twice_its_dimension(kind):
    """Gay (1979): 2 n steps, whatever the matrix; Picard needs its norm below one."""
    p = problems.linear(norm=3.0)
    options = {"rtol": 1e-8, "atol": 0.0, "max_steps": 100}
    solver = Broyden(window=2 * problems.N, kind=kind)
    s = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=solver, **options)
    assert np.all(s.result == Result.converged)
    assert np.all(s.steps <= 2 * problems.N + 2)
    np.testing.assert_allclose(s.value, p.answer, rtol=1e-6, atol=1e-8)
    plain = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=Picard(), **options)
    assert not np.any(plain.result == Result.converged)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_a_constant_map_leaves_nothing_to_update(kind):
    """Both differences vanish, and with them every denominator."""
    z0 = jnp.zeros((2, 3))
    s = jdeq.fixed_point(
        lambda _, z: jnp.ones_like(z), None, z0, solver=Broyden(kind=kind), rtol=0.0, atol=0.0
    )
    np.testing.assert_array_equal(s.value, jnp.ones((2, 3)))
    assert np.all(s.result == Result.converged)


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"kind": "ugly"}, {"mixing": 0.0}, {"damping": 1.5}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="Broyden: "):
        Broyden(**options)
