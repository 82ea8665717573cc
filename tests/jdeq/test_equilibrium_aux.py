"""What an equilibrium solve takes and gives besides its solution: memory, fold, cell outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from jdeq.solvers import Anderson, Broyden, Picard, Reversible
from tests.jdeq import problems

TIGHT = {"rtol": 1e-10, "atol": 0.0, "max_steps": 300}


def cell_with_aux(params, z, x):
    image = problems.tanh_cell(params, z, x)
    return image, {"square": jnp.sum(image**2, axis=1), "count": jnp.argmax(image, axis=1)}


class TestCellOutputs:
    def test_are_taken_at_the_solution(self):
        p = problems.tanh()
        solution = jdeq.deq(cell_with_aux, p.params, p.x, p.z0, has_aux=True, **TIGHT)
        np.testing.assert_allclose(solution.value, p.answer, rtol=1e-8)
        np.testing.assert_allclose(
            solution.aux.cell["square"], (p.answer**2).sum(axis=1), rtol=1e-8
        )
        assert solution.aux.cell["count"].tolist() == np.argmax(p.answer, axis=1).tolist()
        assert solution.aux.memory is None
        assert solution.aux.folded is None

    def test_are_differentiable_through_the_equilibrium(self):
        p = problems.tanh()

        def by_aux(x):
            solution = jdeq.deq(cell_with_aux, p.params, x, p.z0, has_aux=True, **TIGHT)
            return jnp.sum(solution.aux.cell["square"])

        def by_state(x):
            return jnp.sum(jdeq.deq(p.cell, p.params, x, p.z0, **TIGHT).value ** 2)

        np.testing.assert_allclose(jax.grad(by_aux)(p.x), jax.grad(by_state)(p.x), rtol=1e-7)

    def test_of_a_failed_problem_are_nan_and_harm_no_gradient(self):
        p = problems.tanh()

        def total(params, x):
            solution = jdeq.deq(cell_with_aux, params, x, p.z0, has_aux=True, **TIGHT)
            square = solution.aux.cell["square"]
            return jnp.sum(jnp.where(solution.converged, square, 0)), square

        bad = p.x.at[1].set(jnp.nan)
        (_, square), gradient = jax.value_and_grad(total, has_aux=True)(p.params, bad)
        assert np.isnan(square).tolist() == [False, True, False]
        keep = jnp.array([0, 2])
        q = p._replace(x=p.x[keep], z0=p.z0[keep])
        want = jax.grad(
            lambda params: jnp.sum(jdeq.deq(q.cell, params, q.x, q.z0, **TIGHT).value ** 2)
        )(p.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), gradient, want)

    def test_of_a_map(self):
        solution = jdeq.fixed_point(
            lambda params, z: (params * z + 1, z[:, 0]), 0.5, jnp.zeros((2, 3)), has_aux=True
        )
        np.testing.assert_allclose(solution.aux.cell, 2.0, rtol=1e-4)

    def test_must_come_in_a_pair(self):
        p = problems.tanh()
        with pytest.raises(ValueError, match=r"has_aux=True was given, but cell returned"):
            jdeq.deq(p.cell, p.params, p.x, p.z0, has_aux=True)

    def test_must_have_the_problem_axis(self):
        with pytest.raises(ValueError, match=r"aux.* has shape \(\)"):
            jdeq.fixed_point(lambda p, z: (p * z, jnp.sum(z)), 0.5, jnp.ones((2, 3)), has_aux=True)


class TestMemory:
    @pytest.mark.parametrize(
        "solver", [Anderson(5), Anderson(5, "I"), Anderson(5, restart=2.0), Broyden(), Broyden(3)]
    )
    def test_speeds_up_the_next_solve(self, solver):
        p = problems.tanh(norm=0.95, batch=8)
        first = jdeq.deq(
            p.cell, p.params, p.x, p.z0, solver=solver, memory=solver.init(p.z0), **TIGHT
        )
        x = p.x + 1e-3
        start, memory = first.value, first.aux.memory
        cold = jdeq.deq(p.cell, p.params, x, start, solver=solver, **TIGHT)
        warm = jdeq.deq(p.cell, p.params, x, start, solver=solver, memory=memory, **TIGHT)
        assert np.all(warm.converged)
        np.testing.assert_allclose(warm.value, cold.value, rtol=1e-8)
        assert np.mean(warm.steps) < np.mean(cold.steps)

    @pytest.mark.parametrize("solver", [Picard(), Anderson(3), Broyden(4), Reversible(0.5)])
    def test_empty_memory_is_a_cold_start(self, solver):
        p = problems.tanh()
        plain = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=solver, **TIGHT)
        empty = jdeq.deq(
            p.cell, p.params, p.x, p.z0, solver=solver, memory=solver.init(p.z0), **TIGHT
        )
        np.testing.assert_array_equal(empty.value, plain.value)
        np.testing.assert_array_equal(empty.steps, plain.steps)

    @pytest.mark.parametrize("solver", [Anderson(3), Broyden(4)])
    def test_of_a_failed_problem_does_not_spoil_its_next_solve(self, solver):
        p = problems.tanh()
        bad = jdeq.deq(
            p.cell, p.params, p.x.at[1].set(jnp.nan), p.z0,
            solver=solver, memory=solver.init(p.z0), **TIGHT,
        )  # fmt: skip
        assert bad.result.tolist() == [0, 4, 0]
        again = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=solver, memory=bad.aux.memory, **TIGHT)
        assert np.all(again.converged)
        np.testing.assert_allclose(again.value, p.answer, rtol=1e-8)

    def test_is_a_constant_to_autodiff(self):
        p = problems.tanh()
        solver = Anderson()

        def norm(x, memory):
            solution = jdeq.deq(p.cell, p.params, x, p.z0, solver=solver, memory=memory, **TIGHT)
            leaves = jax.tree.leaves(solution.aux.memory)
            return sum(jnp.sum(leaf) for leaf in leaves), jnp.sum(solution.value)

        memory = solver.init(p.z0)
        assert np.all(jax.grad(lambda x: norm(x, memory)[0])(p.x) == 0)
        by_memory = jax.grad(lambda m: norm(p.x, m)[1], allow_int=True)(memory)
        slopes = [v for v in jax.tree.leaves(by_memory) if v.dtype != jax.dtypes.float0]
        assert all(np.all(v == 0) for v in slopes)
        assert len(slopes) == 7

    def test_of_another_solver_is_refused(self):
        p = problems.tanh()
        with pytest.raises(ValueError, match=r"memory.* is expected; pass solver.init"):
            jdeq.deq(p.cell, p.params, p.x, p.z0, memory=Anderson(2).init(p.z0))


class TestFold:
    def test_runs_over_each_problems_iterates(self):
        p = problems.conditioned((0.1, 0.5, 0.9))
        fold = jdeq.Fold(
            lambda most, z, k: jnp.maximum(most, jnp.abs(z).max(axis=1) + k), jnp.zeros(3)
        )
        solution = jdeq.deq(p.cell, p.params, p.x, p.z0, solver=Picard(), fold=fold, **TIGHT)
        last = solution.steps - 1 + np.abs(p.answer).max(axis=1)
        np.testing.assert_allclose(solution.aux.folded, last, rtol=1e-6)

    def test_is_a_constant_to_autodiff(self):
        p = problems.tanh()
        fold = jdeq.Fold(lambda total, z, k: total + z, p.z0)
        gradient = jax.grad(
            lambda x: jnp.sum(jdeq.deq(p.cell, p.params, x, p.z0, fold=fold).aux.folded)
        )(p.x)
        assert np.all(gradient == 0)

    def test_must_keep_its_shape(self):
        p = problems.tanh()
        fold = jdeq.Fold(lambda total, z, k: jnp.sum(z), jnp.zeros(3))
        with pytest.raises(ValueError, match=r"the output of fold.update"):
            jdeq.deq(p.cell, p.params, p.x, p.z0, fold=fold)

    def test_other_things_are_refused(self):
        p = problems.tanh()
        with pytest.raises(TypeError, match=r"jdeq.Fold\(update, start\) is expected"):
            jdeq.deq(p.cell, p.params, p.x, p.z0, fold=(lambda *a: a, 0))
