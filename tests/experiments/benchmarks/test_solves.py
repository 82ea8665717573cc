"""The benchmarks of overhead, compilation and memory, at tiny sizes."""

import json

import jax.numpy as jnp
import pytest

import jdeq
from experiments.benchmarks import compile_time, solve_memory, solve_overhead
from experiments.benchmarks.problems import dense
from experiments.benchmarks.timing import in_turns, spread


def test_contestants_run_in_turns():
    calls = []
    samples = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert calls == ["a", "b"] * 4  # The first round warms up.
    assert [len(values.wall) for values in samples.values()] == [3, 3]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


@pytest.mark.slow
def test_overhead_writes_a_ratio_for_each_solver(tmp_path):
    path = tmp_path / "overhead.json"
    solve_overhead.main(
        solve_overhead.Options(
            output=path, problems=("dense",), short=2, long=30, repeats=2, batch=4
        )
    )
    rows = json.loads(path.read_text())["rows"]["dense"]
    assert set(rows) == {"bare", *solve_overhead.SOLVERS}
    assert rows["Picard"]["bar"] == 1.5


def test_overhead_refuses_a_solve_that_ends_early():
    options = solve_overhead.Options(output=None, short=2, long=200)
    with pytest.raises(RuntimeError, match="steps were asked for"):
        solve_overhead.solve(dense(batch=4, units=8), solve_overhead.SOLVERS["Picard"], options)


def test_second_eager_call_compiles_nothing():
    assert compile_time.second_call(dense(batch=4, units=8)) == {"solve": 0, "gradient": 0}


def test_compiled_programs_are_counted():
    assert compile_time.count_compiled(lambda: jnp.cos(jnp.ones(7) * 3)) > 0


@pytest.mark.slow
def test_compile_time_has_all_parts():
    problem = dense(batch=4, units=8)
    (row, *_) = compile_time.compile_times(problem, repeats=1, libraries=("jdeq",)).values()
    assert set(row) == {"trace", "lower", "compile", "total"}
    total = sum(row[part]["median"] for part in ("trace", "lower", "compile"))
    assert total == pytest.approx(row["total"]["median"], rel=0.05)


@pytest.mark.slow
def test_memory_of_the_implicit_gradient_does_not_grow_and_that_of_the_unrolled_does():
    problem = dense(batch=4, units=8)
    row = solve_memory.row(problem, "Implicit")
    assert min(row["bytes"]) > 0
    assert row["growth"] <= solve_memory.BAR
    assert solve_memory.row(problem, "NoSuchAdjoint") == {"absent": True}
    unrolled, solver = jdeq.adjoints.Unrolled(), jdeq.solvers.Picard()
    short, long = (solve_memory.peak(problem, unrolled, solver, steps) for steps in (4, 40))
    assert long > 1.5 * short
