"""The comparison with peers at tiny sizes: fair problems, checked answers, complete results."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdeq
from experiments.adversarial.model import ClassifierConfig
from experiments.benchmarks import jax_solvers, peers
from experiments.benchmarks.jax_solvers import Scale
from experiments.benchmarks.problems import Judge, dense, inner_product, mnist, uneven

TINY = ClassifierConfig(image_shape=(8, 8, 1), widths=(8, 8))


def test_uneven_problems_need_from_5_to_200_steps():
    problem = uneven()
    solution = jdeq.deq(
        problem.cell, problem.params, problem.inject(problem.params, problem.x), problem.z0,
        solver=jdeq.solvers.Picard(), rtol=1e-5, atol=0.0, max_steps=problem.max_steps,
    )  # fmt: skip
    steps = np.sort(np.asarray(solution.steps))
    assert 3 <= steps[0] <= 7
    assert 180 <= steps[-1] <= 215
    # Evenly spread: the quartiles lie where those of a uniform distribution do, but for the
    # deviations from its law that `uneven` speaks of.
    quartiles = np.quantile(steps, (0.25, 0.5, 0.75))
    np.testing.assert_allclose(
        quartiles, steps[0] + np.ptp(steps) * np.array([1, 2, 3]) / 4, rtol=0.1
    )


def test_judge_measures_the_residuals_of_state_and_adjoint():
    problem = dense(batch=3, units=5)
    injected = problem.inject(problem.params, problem.x)
    z = problem.z0
    for _ in range(200):
        z = problem.cell(problem.params, z, injected)
    judge = Judge(problem)
    assert judge.residual(z) < 1e-6
    assert judge.residual(z.at[1].multiply(1.1)) > 1e-3
    slopes = 1 - z**2
    # u = W diag(slope) u + weights, row by row.
    u = jnp.stack(
        [
            jnp.linalg.solve(jnp.eye(5) - problem.params["w"] * slope, weight)
            for slope, weight in zip(slopes, problem.weights, strict=True)
        ]
    )
    assert judge.adjoint_residual(z, u) < 1e-5
    assert judge.adjoint_residual(z, u.at[2].add(0.1)) > 1e-3


def test_bisection_finds_the_loosest_tolerance_that_passes():
    scale = Scale(high=1.0, low=1e-6, halvings=6)
    tolerance, residual = peers.loosest(lambda tol: 0.01 * tol, scale)
    assert residual <= 1.01e-5
    assert tolerance == pytest.approx(1e-3, rel=0.1)
    tolerance, residual = peers.loosest(lambda tol: 0.5, scale)
    assert residual == 0.5
    steps, _ = peers.loosest(lambda n: 0.5**n, Scale(high=4, low=300, halvings=9, whole=True))
    assert steps == 17  # 2^-17 = 7.6e-6


@pytest.mark.slow
def test_jdeq_and_jaxopt_in_one_run(tmp_path):
    path = tmp_path / "peers.json"
    peers.main(
        peers.Options(
            output=path, problems=("dense",), libraries=("jdeq", "jaxopt"), repeats=2, batch=4,
            exclude=("vmap", "Newton", "Broyden", "Anderson", "CG", "GMRES", "the default"),
        )
    )  # fmt: skip
    result = json.loads(path.read_text())
    for column in ("dense, forward", "dense, gradient"):
        rows = result["columns"][column]["rows"]
        assert {row["library"] for row in rows} == {"jdeq", "jaxopt"}
        for row in rows:
            assert row["passes"], row
            assert row["residual"] <= 1.01e-5
            assert row["seconds"]["min"] > 0
        assert set(result["columns"][column]["summary"]) == {"jdeq", "jaxopt"}


def check_solver(contestant):
    problem = dense(batch=4, units=8)
    entry = peers.Entry(contestant)
    peers.tune(entry, peers.state_measure(problem, Judge(problem), entry), contestant.scale)
    assert entry.tolerance is not None, (entry.residual, entry.error)


def test_optimistix_reaches_the_goal():
    pytest.importorskip("optimistix")
    check_solver(jax_solvers.optimistix_contestants()[0])


def test_banax_reaches_the_goal():
    pytest.importorskip("banax")
    check_solver(jax_solvers.banax_contestants()[0])


@pytest.mark.parametrize(
    "problem",
    [dense(batch=3, units=8), mnist(2, TINY), uneven(batch=3, units=8)],
    ids=lambda problem: problem.name,
)
def test_torch_computes_the_same_cell_and_gradient(problem):
    pytest.importorskip("torchdeq")
    import torch

    from experiments.benchmarks import torch_solvers

    twin = torch_solvers.Twin(problem)
    keys = iter(jax.random.split(jax.random.key(0), 4))
    z = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), problem.z0)

    def loss(params, x):
        out = problem.cell(params, z, problem.inject(params, x))
        return inner_product(problem.weights, out)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(problem.params, problem.x)
    tensors = [torch_solvers.to_torch(leaf) for leaf in jax.tree.leaves(z)]
    out = torch_solvers._as_list(twin.bind()(*tensors))
    torch_value = torch_solvers._loss(twin, out)
    torch_gradients = torch.autograd.grad(torch_value, twin.leaves)
    assert float(torch_value.detach()) == pytest.approx(float(value), rel=1e-4, abs=1e-4)
    # Two libraries sum float32 in different orders; their ReLUs differ where an input is near zero.
    np.testing.assert_allclose(
        peers.leaf_norms(torch_gradients), peers.leaf_norms(gradients), rtol=1e-3, atol=1e-5
    )
