"""Diagnoses of problems whose every number has a formula."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq import _spectrum, _tree
from jdeq.solution import Result
from tests.jdeq import problems

SOLVE = {"rtol": 1e-9, "atol": 0.0, "max_steps": 1000}
LOOK = {"linear_rtol": 1e-12}


def matrices(o):
    W, U = np.asarray(o.params["W"]), np.asarray(o.params["U"])
    R = np.linalg.solve(np.eye(problems.N) - W, U)
    return W, U, R, o.params["scale"] * (R.T @ R + problems.WEIGHT * np.eye(problems.M))


def radius(matrix):
    return np.max(np.abs(np.linalg.eigvals(matrix)))


def joint_matrix(o, step, projection):
    """Of ``(z, x, mu) -> (W z + U x, P (x - step (U^T mu + s w x)), W^T mu + s z)``."""
    W, U, _, _ = matrices(o)
    n, m, s = problems.N, problems.M, float(o.params["scale"])
    return np.block(
        [
            [W, U, np.zeros((n, n))],
            [
                np.zeros((m, n)),
                projection * (1 - step * s * problems.WEIGHT),
                -step * projection @ U.T,
            ],
            [s * np.eye(n), np.zeros((n, m)), W.T],
        ]
    )


def test_the_best_relaxation_is_that_of_the_eigenvalues():
    """Symmetric cells: best is two over the sum of the extreme eigenvalues of I - df/dz."""
    low, high = jnp.array([0.1, -0.6, 0.8])[:, None], jnp.array([0.8, 0.2, 0.9])[:, None]

    def cell(params, z, x, data):
        return jnp.concatenate([data[0], data[1]], 1) * z + x

    problem = jdeq.InputProblem(cell, lambda params, z, x, t, data: jnp.sum((z - t) ** 2, 1))
    zeros = jnp.zeros((3, 2))
    d = jdeq.diagnose(problem, None, zeros + 1, zeros, zeros, data=(low, high), max_steps=2000)
    want = 2 / (2 - low - high)[:, 0]
    np.testing.assert_allclose(d.state_relaxation, np.minimum(np.round(want, 1), 1.9))
    alone = jax.tree.map(lambda v: v[:1], (zeros, (low, high)))
    d = jdeq.diagnose(problem, None, alone[0] + 1, alone[0], alone[0], data=alone[1])
    assert any("adjoint_relaxation of 1.8" in sentence for sentence in d.advice)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("constraint", ["free", "box"])
def test_every_number_has_its_closed_form(constraint, scale):
    o = problems.optimum(constraint, scale=scale)
    d = jdeq.diagnose(*o.arguments, data=o.data, **LOOK, **SOLVE)
    W, _, R, H = matrices(o)
    singular, curvature = np.linalg.svd(R, compute_uv=False), np.linalg.eigvalsh(H)
    every = np.ones(problems.B)
    np.testing.assert_allclose(d.state_radius, radius(W) * every, rtol=1e-6)
    np.testing.assert_allclose(d.kernel_condition, (singular[0] / singular[-1]) ** 2 * every)
    np.testing.assert_allclose(d.pl_constant, singular[-1] ** 2 * every)
    np.testing.assert_allclose(d.hessian_smallest, curvature[0] * every, rtol=1e-6)
    np.testing.assert_allclose(d.hessian_largest, curvature[-1] * every, rtol=1e-6)
    np.testing.assert_allclose(d.hessian_condition, curvature[-1] / curvature[0] * every, rtol=1e-6)
    np.testing.assert_allclose(d.largest_stable_step, 2 / curvature[-1] * every, rtol=1e-6)
    np.testing.assert_allclose(d.step_size, 1 / curvature[-1] * every, rtol=1e-6)
    for i, x in enumerate(o.x):
        free = (x > -0.2) & (x < 0.3) if constraint == "box" else np.ones(problems.M, bool)
        want = radius(joint_matrix(o, 1 / curvature[-1], np.diag(free.astype(float))))
        np.testing.assert_allclose(d.augmented_radius[i], want, rtol=1e-5)
    assert np.all(d.linear_residual < 1e-11)
    assert np.all(d.solution.result == Result.converged)
    for block in d.relative:
        assert np.all(block <= 1e-9)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e4])
def test_the_joint_radius_does_not_depend_on_units_in_float32(unit):
    """Of an x of 1e-6 or 1e4, far from the optimum. Regression: it was wrong by up to fourfold."""
    o = problems.optimum(seed=1)
    moved = {"U": o.params["U"] / unit, "weight": o.params["weight"] / unit**2}
    arguments = ({**o.params, **moved}, *o.arguments[2:])
    single = jax.tree.map(lambda v: v.astype(jnp.float32), arguments)
    for share in (0.5, 1.4):
        step = share / float(np.linalg.eigvalsh(matrices(o)[3])[-1])
        d = jdeq.diagnose(o.problem, *single, step_size=step * unit**2, max_steps=5)
        want = radius(joint_matrix(o, step, np.eye(problems.M)))
        np.testing.assert_allclose(d.augmented_radius, want, rtol=1e-4)


def test_bfloat16_has_the_numbers_of_its_problem():
    """Regression: one Krylov vector passed for the whole space, and steps of 1.7 for stable."""
    o = problems.optimum()
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (o.params, *o.arguments[2:]))
    d = jdeq.diagnose(o.problem, *half, max_steps=100)
    W, _, R, H = matrices(o)
    singular, curvature = np.linalg.svd(R, compute_uv=False), np.linalg.eigvalsh(H)
    np.testing.assert_allclose(d.state_radius, radius(W), rtol=0.05)
    np.testing.assert_allclose(d.hessian_smallest, curvature[0], rtol=0.05)
    np.testing.assert_allclose(d.largest_stable_step, 2 / curvature[-1], rtol=0.05)
    np.testing.assert_allclose(d.kernel_condition, (singular[0] / singular[-1]) ** 2, rtol=0.1)


def test_of_a_solution_that_is_there_and_its_residuals():
    o = problems.optimum()
    s = jdeq.joint_solve(*o.arguments, max_steps=15)
    d = jdeq.diagnose(*o.arguments[:3], s)
    jax.tree.map(np.testing.assert_array_equal, d.solution, s)
    f = problems.linear_cell(o.params, s.value.z, s.value.x)
    want = np.linalg.norm(f - s.value.z, axis=1) / np.linalg.norm(f, axis=1)
    np.testing.assert_allclose(d.relative.state, want, rtol=1e-6)
    adjoint = s.value.mu @ o.params["W"] + s.value.z - o.target
    want = np.linalg.norm(adjoint - s.value.mu, axis=1) / np.linalg.norm(adjoint, axis=1)
    np.testing.assert_allclose(d.relative.adjoint, want, rtol=1e-6)
    np.testing.assert_array_equal(d.relative.stationarity, s.residual.stationarity)


@pytest.mark.slow
def test_the_largest_stable_step_is_where_gradient_descent_turns():
    """On a bent problem, by taking steps a little shorter and a little longer."""
    rng = np.random.default_rng(0)
    params = {
        "W": jnp.array(problems.matrix(rng, 6, 6, 0.6)),
        "U": jnp.array(problems.matrix(rng, 6, 3, 1.5)),
        "b": jnp.array(rng.normal(size=6)),
        "scale": jnp.array(1.0),
        "weight": jnp.array(0.1),
    }
    target, x0, z0 = jnp.array(rng.normal(size=(2, 6))), jnp.zeros((2, 3)), jnp.zeros((2, 6))
    problem = jdeq.InputProblem(problems.tanh_cell, problems.quadratic)
    d = jdeq.diagnose(problem, params, target, x0, z0, **LOOK, **SOLVE)

    @jax.jit
    @jax.grad
    def gradient(x):
        z = jdeq.deq(problems.tanh_cell, params, x, z0, rtol=1e-13, atol=0.0).value
        return jnp.sum(problems.quadratic(params, z, x, target))

    def growth(share):
        step = share * d.largest_stable_step[:, None]
        x = d.solution.value.x + 1e-5 * jnp.array(rng.normal(size=(2, 3)))
        lengths = []
        for _ in range(60):
            x = x - step * gradient(x)
            lengths.append(jnp.linalg.norm(x - d.solution.value.x, axis=1))
        return lengths[-1] / lengths[-11]

    assert np.all(growth(0.97) < 1)
    assert np.all(growth(1.03) > 1)


def tree_cell(params, z, x):
    return {"a": 0.5 * z["a"] + x[:, :2], "b": 0.2 * z["b"] + 3 * x[:, 2:3]}


def tree_objective(params, z, x, target):
    return sum(jnp.sum((leaf - target) ** 2, 1) for leaf in z.values()) + jnp.sum(x**2, 1)


@pytest.mark.slow
def test_more_inputs_than_states_in_float32_under_jit():
    """``J J^T`` is then the smaller kernel; its eigenvalues are 4, 4 and ``(3 / 0.8)^2``."""
    problem = jdeq.InputProblem(tree_cell, tree_objective)
    z0 = {"a": jnp.zeros((2, 2), jnp.float32), "b": jnp.zeros((2, 1), jnp.float32)}
    arguments = jnp.ones((2, 1), jnp.float32), jnp.zeros((2, 7), jnp.float32), z0
    d = jax.jit(lambda *args: jdeq.diagnose(problem, None, *args))(*arguments)
    largest = (3 / 0.8) ** 2
    np.testing.assert_allclose(d.pl_constant, 4.0, rtol=1e-5)
    np.testing.assert_allclose(d.kernel_condition, largest / 4, rtol=1e-5)
    np.testing.assert_allclose(d.hessian_smallest, 2.0, rtol=1e-5)
    np.testing.assert_allclose(d.hessian_largest, 2 * largest + 2, rtol=1e-5)
    np.testing.assert_allclose(d.state_radius, 0.5, rtol=1e-5)
    numbers = dataclasses.replace(d, solution=None)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(numbers))
    assert "2 converged" in str(d)


def toy_cell(params, z, x, data):
    return data["rate"] * z + x * jnp.concatenate([data["gain"], 1e-3 + 0 * data["gain"]], axis=1)


def toy_objective(params, z, x, target, data):
    distance = 0.5 * jnp.sum((z - target) ** 2, 1)
    return distance + 0.5 * data["weight"][:, 0] * jnp.sum(x**2, 1)


TOY = jdeq.InputProblem(toy_cell, toy_objective)


def toy(rate=(0.5, 0.5), weight=(1.0, 1.0), gain=(1.0, 1.0), target=1.0, **options):
    """Two problems of a state and an input of two entries; the second is the sick one."""
    numbers = {"rate": rate, "weight": weight, "gain": gain}
    data = {name: jnp.array(pair)[:, None] for name, pair in numbers.items()}
    target = jnp.ones((2, 2)) * jnp.array([1.0, target])[:, None]
    zeros = jnp.zeros((2, 2))
    options = {"step_budget": 2000, **options}
    return jdeq.diagnose(TOY, None, target, zeros, zeros, data=data, max_steps=2000, **options)


def test_nothing_stands_out_where_all_is_well():
    d = jdeq.diagnose(*problems.optimum().arguments)
    assert d.advice == ["Nothing stands out: all problems converged and are well conditioned."], (
        d.advice
    )
    text = str(d)
    assert text.startswith("Diagnosis of 3 problems: 3 converged\n")
    assert "spectral radius of the cell" in text
    assert d.advice[0] in text


@pytest.mark.parametrize(
    ("sick", "says"),
    [
        ({"rate": (0.5, -1.2), "step_budget": 40}, "no contraction at the solution of 1 of 2"),
        ({"rate": (0.5, 0.99)}, "contracts slowly in 1 of 2"),
        ({"weight": (1.0, 1e-6)}, "ill-conditioned along x in 1 of 2 problems"),
        ({"weight": (1.0, -20.0), "step_budget": 30}, "curves downwards along some direction"),
        ({"target": np.nan}, "1 of 2 problems ended as non_finite. An evaluation gave NaN"),
        ({"step_budget": 3}, "2 of 2 problems ended as max_steps. The step limit came before"),
    ],
)
def test_the_advice_names_what_is_wrong(sick, says):
    d = toy(**sick)
    assert any(says in sentence for sentence in d.advice), d.advice
    assert says in str(d)


def test_an_objective_without_curvature_is_not_called_ill_conditioned():
    o = problems.optimum("box")
    linear = dataclasses.replace(
        o.problem, objective=lambda _, z, x, target: jnp.sum(z * target, 1)
    )
    d = jdeq.diagnose(linear, *o.arguments[1:])
    np.testing.assert_array_equal(d.hessian_largest, 0)
    assert not any("ill-conditioned" in sentence for sentence in d.advice), d.advice


def test_a_step_that_is_too_long_is_named():
    d = toy()
    long = dataclasses.replace(d, step_size=d.largest_stable_step * jnp.array([0.9, 1.1]))
    (sentence,) = long.advice
    assert "longer than gradient descent allows in 1 of 2 problems" in sentence
    assert f"stable steps is {2 / 5:.3g}" in sentence


def test_an_input_without_effect_makes_the_kernel_singular():
    d = toy(gain=(1.0, 0.0))
    np.testing.assert_array_equal(np.isinf(d.kernel_condition), [False, True])
    np.testing.assert_allclose(d.kernel_condition[0], 1e6, rtol=1e-5)
    np.testing.assert_allclose(d.pl_constant, [4e-6, 0], rtol=1e-5, atol=1e-15)
    assert any("Some direction of x hardly moves the state in 1 of 2" in s for s in d.advice)


def test_a_bad_problem_changes_nobody_elses_numbers():
    clean, sick = toy(target=1.0), toy(target=np.nan)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(sick), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    unknown = (sick.hessian_largest, sick.hessian_condition, sick.largest_stable_step)
    for value in (*unknown, sick.step_size, sick.augmented_radius):
        assert np.isnan(value[1])
    np.testing.assert_allclose(sick.state_radius[1], 0.5)  # of the cell alone


def test_the_unfinished_block_is_named():
    o = problems.optimum()
    value = jdeq.AugmentedState(jnp.array(o.z), jnp.array(o.x), jnp.array(o.mu))
    s = jdeq.joint_solve(*o.arguments, max_steps=3)
    small = jax.tree.map(jnp.zeros_like, s.residual)
    spoilt = dataclasses.replace(s, value=value._replace(mu=value.mu + 1), residual=small)
    d = jdeq.diagnose(*o.arguments[:3], spoilt)
    assert any("that of the adjoint is the largest" in sentence for sentence in d.advice)


def test_the_rounding_floor_is_named_and_nothing_else_blamed():
    def found(size, code):
        column = jnp.full(2, size, jnp.float32)
        start = jdeq.AugmentedState(*[jnp.zeros((2, 1))] * 3)
        codes = jnp.full(2, code, jnp.int32)
        residual = jdeq.KKTResidual(column, column, column)
        solution = jdeq.Solution(start, codes, codes, residual)
        numbers = [jnp.full(2, value) for value in (0.3, 1.0, 1.2, 0.1, 2.0, 1.0, 0.5, 1.0, 1e-7)]
        return " ".join(jdeq.Diagnosis(solution, residual, *numbers).advice)

    at_floor = found(1e-6, Result.max_steps)
    assert "2 of 2 problems that did not converge" in at_floor
    assert "rounding floor of float32" in at_floor
    assert "diverges" not in at_floor
    assert "rounding floor of" not in found(1e-6, Result.converged)
    above = found(1e-3, Result.max_steps)
    assert "rounding floor of float32" not in above
    assert "diverges" in above


def test_refuses_what_does_not_go_together():
    o = problems.optimum()
    s = jdeq.joint_solve(*o.arguments, max_steps=3)
    with pytest.raises(TypeError, match="x0 was given without z0"):
        jdeq.diagnose(*o.arguments[:4])
    with pytest.raises(TypeError, match="together with max_steps"):
        jdeq.diagnose(*o.arguments[:3], s, max_steps=4)
    with pytest.raises(TypeError, match="together with z0"):
        jdeq.diagnose(*o.arguments[:3], s, o.z0)
    with pytest.raises(TypeError, match="AugmentedState"):
        jdeq.diagnose(*o.arguments[:3], jdeq.deq(problems.linear_cell, o.params, o.x0, o.z0))
    with pytest.raises(TypeError, match="max_stepz"):
        jdeq.diagnose(*o.arguments, max_stepz=4)
    with pytest.raises(ValueError, match="dimension=0"):
        jdeq.diagnose(*o.arguments, dimension=0)


@pytest.mark.parametrize("size", [1, 12])
def test_spectra_are_exact_in_the_whole_space(size):
    """Complex pairs, defective matrices, repeated eigenvalues, zero; each problem on its own."""
    rng = np.random.default_rng(size)
    matrices = np.stack(
        [
            rng.normal(size=(size, size)),
            0.5 * np.eye(size) + np.eye(size, k=1),
            -2.0 * np.eye(size),
            np.zeros((size, size)),
        ]
    )
    start = _tree.normal_like(jax.random.key(0), jnp.zeros((4, size)))

    def product(of):
        return lambda v: jnp.einsum("bij,bj->bi", jnp.array(of), v)

    got = _spectrum.spectral_radius(product(matrices), start, dimension=14)
    # Rounding moves a defective eigenvalue of multiplicity k by the k-th root of it.
    np.testing.assert_allclose(got, [radius(m) for m in matrices], rtol=0.1, atol=1e-12)
    np.testing.assert_allclose(got[0], radius(matrices[0]), rtol=1e-6)
    relaxations = (0.3, 1.0, 1.7)
    got = _spectrum.relaxed_radii(product(matrices), start, relaxations, dimension=14)
    for w, radii in zip(relaxations, got, strict=True):
        want = [radius((1 - w) * np.eye(size) + w * m) for m in matrices]
        # The defective one is left aside: the twelfth root of rounding is not small.
        np.testing.assert_allclose(np.delete(radii, 1), np.delete(want, 1), rtol=1e-6, atol=1e-12)
    symmetric = matrices + matrices.swapaxes(1, 2)
    smallest, largest = _spectrum.extreme_eigenvalues(product(symmetric), start, dimension=14)
    want = np.linalg.eigvalsh(symmetric)
    np.testing.assert_allclose(smallest, want[:, 0], atol=1e-12)
    np.testing.assert_allclose(largest, want[:, -1], atol=1e-12)
