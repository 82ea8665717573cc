from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.solution import Result
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems


def reference_path(f, z, steps, window, kind, mixing, regularization=0.0):
    """Anderson acceleration of one problem, by least squares on explicit matrices."""
    zs, gs = [z], [f(z) - z]
    for k in range(steps):
        m = min(k, window)
        z, g = zs[-1], gs[-1]
        step = mixing * g
        if m:
            dZ = np.stack([zs[i + 1] - zs[i] for i in range(k - m, k)], axis=1)
            dG = np.stack([gs[i + 1] - gs[i] for i in range(k - m, k)], axis=1)
            left = dG if kind == "II" else dZ
            A, b = left.T @ dG, left.T @ g
            d = np.diag(A)
            A = A + regularization * np.diag(d)
            step = step - (dZ + mixing * dG) @ np.linalg.solve(A, b)
        zs.append(z + step)
        gs.append(f(zs[-1]) - zs[-1])
    return np.array(zs)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize(
    ("window", "mixing", "regularization"), [(1, 1.0, 0.0), (3, 1.0, 1e-3), (2, 0.5, 0.5)]
)
def test_takes_the_steps_of_the_textbook(kind, window, mixing, regularization):
    p = problems.tanh()
    steps = 8
    solution = jdeq.deq(
        p.cell,
        p.params,
        p.x,
        p.z0,
        solver=Anderson(window, kind, mixing, regularization),
        rtol=0.0,
        atol=0.0,
        max_steps=steps + 1,
        history=lambda z: z,
    )
    for i in range(problems.B):

        def f(z, i=i):
            return np.asarray(p.cell(p.params, z[None], p.x[i : i + 1])[0])

        path = reference_path(f, np.zeros(problems.N), steps, window, kind, mixing, regularization)
        np.testing.assert_allclose(solution.history.record[:, i], path, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_a_memory_of_another_map_serves_the_next_solve(kind):
    """The right-hand side is carried from step to step, over the start of a solve too, where the
    residual jumps and one slot is given up."""
    p = problems.tanh()
    solver = Anderson(3, kind, mixing=0.5, regularization=0.0)
    step = jax.jit(solver.step)

    def run(z, memory, x, steps):
        for k in range(steps):
            before = z
            fz = p.cell(p.params, z, x)
            z, memory = step(z, fz, memory, jnp.asarray(k))
        return z, memory, before, fz

    z, memory, _, _ = run(p.z0, solver.init(p.z0), p.x, 6)
    z_next, memory, z, fz = run(z, memory, 2 - p.x, 1)
    for i in range(problems.B):
        dG, dY, g = memory.dg[i][:2], memory.dy[i][:2], (fz - z)[i]
        left = dG if kind == "II" else dY - 0.5 * dG
        np.testing.assert_allclose(memory.rhs[i][:2], left @ g, rtol=1e-9)
        assert memory.rhs[i][2] == 0
        gamma = np.linalg.solve(left @ dG.T, left @ g)
        want = z[i] + 0.5 * g - gamma @ dY
        np.testing.assert_allclose(z_next[i], want, rtol=1e-7)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_solves_a_linear_map_in_as_many_steps_as_it_has_dimensions(kind):
    p = problems.linear(norm=0.95)
    solver = Anderson(window=problems.N, kind=kind, regularization=0.0)
    solution = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=solver, rtol=1e-9, atol=0.0)
    assert np.all(solution.result == Result.converged)
    # N differences, the step that uses them, and the evaluation that confirms it.
    assert np.all(solution.steps <= problems.N + 2)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_more_regularization_comes_nearer_to_a_plain_step(kind):
    """Regression: type I subtracted it from its negative diagonal, and one made it singular."""
    p = problems.conditioned((0.5, 0.7, 0.9))

    def third_iterate(solver):
        solution = jdeq.deq(
            p.cell, p.params, p.x, p.z0, solver=solver, rtol=0.0, max_steps=3, history=lambda z: z
        )
        return np.asarray(solution.history.record[2])

    amounts = (0.0, 1.0, 2.0)
    plain = third_iterate(Picard())
    distances = [
        np.linalg.norm(third_iterate(Anderson(1, kind, regularization=r)) - plain, axis=1)
        for r in amounts
    ]
    # One difference: the step along it shrinks by 1 + regularization exactly.
    for r, distance in zip(amounts, distances, strict=True):
        np.testing.assert_allclose(distance, distances[0] / (1 + r), rtol=1e-8)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_windows_are_kept_leaf_by_leaf(kind):
    """A state cut into leaves takes the steps of the state in one piece."""
    p = problems.tanh()

    def cut(z):
        return {"a": z[:, :2], "b": [z[:, 2:].reshape(z.shape[0], 3, 1)]}

    def glue(z):
        return jnp.concatenate([z["a"], z["b"][0][:, :, 0]], axis=1)

    def cell(params, z, x):
        return cut(p.cell(params, glue(z), x))

    options = {"solver": Anderson(window=3, kind=kind), "rtol": 1e-9}
    whole = jdeq.deq(p.cell, p.params, p.x, p.z0, **options)
    pieces = jdeq.deq(cell, p.params, p.x, cut(p.z0), **options)
    np.testing.assert_allclose(glue(pieces.value), whole.value, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(pieces.steps, whole.steps)


def test_a_constant_map_leaves_no_direction_to_mix():
    """Differences of zero make a singular system; the plain step is right."""
    z0 = jnp.ones((2, 3))
    solution = jdeq.deq(lambda p, z, x: x + 0 * z, None, 2 * z0, z0, solver=Anderson())
    assert solution.steps.tolist() == [2, 2]
    np.testing.assert_array_equal(solution.value, 2 * z0)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("window", 0, "an integer of at least 1"),
        ("window", 2.0, "an integer of at least 1"),
        ("window", True, "an integer of at least 1"),
        ("kind", "III", "one of 'I', 'II'"),
        ("kind", 1, "one of 'I', 'II'"),
        ("mixing", 0.0, r"a number in \(0, 1\]"),
        ("mixing", 1.5, r"a number in \(0, 1\]"),
        ("regularization", -1e-8, "a finite number of at least 0"),
        ("regularization", float("inf"), "a finite number of at least 0"),
        ("regularization", "none", "a finite number of at least 0"),
    ],
)
def test_refuses_options_outside_their_range(option, value, expected):
    with pytest.raises(ValueError, match=rf"Anderson: {option}=.* was given, but {expected}"):
        Anderson(**{option: value})


class TestRestart:
    def test_a_residual_that_rose_empties_the_window(self):
        """After a restart the step is the plain one, and so the next is Anderson's first."""
        solver, plain = Anderson(3, restart=1.5), Anderson(3)
        z = jnp.array([[1.0, -2.0]])
        images = [jnp.array([[0.5, -1.5]]), jnp.array([[0.7, -1.0]]), jnp.array([[9.0, 9.0]])]
        memory = solver.init(z)
        for k, image in enumerate(images):
            z_next, memory = solver.step(z, image, memory, jnp.array(k))
            if k < 2:
                z = z_next
        np.testing.assert_array_equal(z_next, images[-1])
        assert not memory.kept.any()
        # From here on both know the last residual and target alone.
        again = plain.init(z)
        _, again = plain.step(z, images[-1], again, jnp.array(0))
        after = jnp.array([[4.0, 3.0]])
        restarted, _ = solver.step(z_next, after, memory, jnp.array(3))
        fresh, _ = plain.step(z_next, after, again, jnp.array(1))
        np.testing.assert_allclose(restarted, fresh, rtol=1e-12)

    def test_problems_restart_on_their_own(self):
        solver = Anderson(3, restart=2.0)
        z = jnp.ones((2, 2))
        memory = solver.init(z)
        for k, size in enumerate([(0.5, 0.5), (0.4, 0.4), (0.3, 5.0)]):
            image = z + jnp.array(size)[:, None] * jnp.array([[1.0, 0.3 * k]])
            z, memory = solver.step(z, image, memory, jnp.array(k))
        assert memory.kept.any(axis=1).tolist() == [True, False]

    def test_solves_as_without_it(self):
        p = problems.tanh(norm=0.95)
        solution = jdeq.deq(
            p.cell,
            p.params,
            p.x,
            p.z0,
            solver=Anderson(restart=1.2),
            rtol=1e-10,
            atol=0.0,
            max_steps=300,
        )
        assert np.all(solution.converged)
        np.testing.assert_allclose(solution.value, p.answer, rtol=1e-8)

    @pytest.mark.parametrize("bad", [1, 0.5, -2.0, float("inf"), "2"])
    def test_must_be_above_one(self, bad):
        with pytest.raises(ValueError, match=r"restart=.* a number above 1 is expected"):
            Anderson(restart=bad)
