"""The loop, on hand-written steps whose every number is known."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdeq._standing import (
    DIVERGENCE_FACTOR,
    GUARD_BURN_IN,
    GUARD_SLACK,
    STAGNATION_STEPS,
    Report,
)
from jdeq.iterate import Fold, iterate
from jdeq.solution import Result


def play(
    merits, *, guards=None, sizes=None, settled=None, evaluations=None, tolerance=-1.0, **options
):
    """Runs the loop over a script: row k of ``merits [T, B]`` is the report on iterate k, which
    is the number k itself, one a problem."""
    merits = jnp.asarray(merits, float)
    guards = None if guards is None else jnp.asarray(guards, float)
    sizes = jnp.ones_like(merits) if sizes is None else jnp.asarray(sizes, float)

    evaluations = None if evaluations is None else jnp.asarray(evaluations)
    settled = None if settled is None else jnp.asarray(settled, bool)

    def prepare(columns):
        def step(position, memory, k):
            def row(table):
                return None if table is None else table[k, columns]

            report = Report(
                residual={"r": row(merits)},
                converged=row(merits) <= tolerance,
                merit=row(merits),
                guard=row(guards),
                size=row(sizes),
                evaluations=row(evaluations),
                settled=row(settled),
            )
            return position + 1, memory + 1, report

        return step

    @jax.jit
    def run():
        start = jnp.zeros(merits.shape[1], jnp.int32)
        columns = jnp.arange(merits.shape[1])
        report = jax.eval_shape(lambda: prepare(columns)(start, start, 0)[2])
        return iterate(prepare, columns, start, start, report=report, **options)

    return run()


def script(*columns):
    """Scripts of several problems side by side, the last entry of each repeated."""
    length = max(len(c) for c in columns)
    return np.array([[*c, *[c[-1]] * (length - len(c))] for c in columns], float).T


def test_each_problem_stops_at_its_first_converged_iterate():
    merits = script([9, 1, 9, 9, 9], [9, 9, 9, 1, 0.5], [9, 8, 7, 6, 5])
    solution, final = play(merits, tolerance=1.0, max_steps=5)
    assert solution.result.tolist() == [Result.converged, Result.converged, Result.max_steps]
    assert solution.value.tolist() == [1, 3, 4]
    assert solution.steps.tolist() == [2, 4, 5]
    assert solution.residual["r"].tolist() == [1, 1, 5]
    assert final.merit.tolist() == [1, 1, 5]


def test_the_loop_ends_with_the_last_problem():
    solution, _ = play(
        script([9, 1, 9, 9], [9, 9, 1, 9]), tolerance=1.0, max_steps=4, record=jnp.ones_like
    )
    assert solution.history.record.any(axis=1).tolist() == [True, True, True, False]


def test_a_finished_problem_keeps_its_memory_if_that_is_wanted():
    merits = script([9, 1, 9, 9], [9, 9, 1, 9])
    assert play(merits, tolerance=1.0, max_steps=4)[1].memory is None
    _, final = play(merits, tolerance=1.0, max_steps=4, keep_memory=True)
    assert final.memory.tolist() == [2, 3]


def test_a_fold_sees_each_problem_until_it_finishes():
    fold = Fold(lambda total, at, k: total + 10 * at + k, jnp.zeros(2, jnp.int32))
    _, final = play(script([9, 1, 9, 9], [9, 9, 1, 9]), tolerance=1.0, max_steps=4, fold=fold)
    assert final.folded.tolist() == [11, 33]


@pytest.mark.parametrize("sizes", [1, 2, 7])
@pytest.mark.parametrize("record", [False, True])
def test_compaction_changes_nothing(sizes, record):
    merits = 9 * np.linspace(0.3, 0.98, 13) ** np.arange(30)[:, None]
    merits[3:, 3] = np.nan
    merits[5:, 4] = 1e9
    options = {"tolerance": 2.0, "max_steps": 25, "record": record, "keep_memory": True}
    plain, plain_final = play(merits, **options)
    compacted, compacted_final = play(merits, compaction=sizes, **options)
    chex.assert_trees_all_equal(compacted, plain)
    chex.assert_trees_all_equal(compacted_final, plain_final)
    assert len(set(plain.steps.tolist())) > 5


def test_the_best_iterate_is_returned_the_last_included():
    merits = script([5, 1, 3, 4], [5, 4, 3, 2], [5, 6, 7, 8], [2, 1, 1, 2])
    solution, _ = play(merits, max_steps=4)
    assert solution.value.tolist() == [1, 3, 0, 1]
    assert solution.residual["r"].tolist() == [1, 2, 5, 1]


def test_counts_what_a_step_says_it_spent():
    evaluations = np.array([[3, 1], [4, 1], [5, 9]])
    solution, _ = play(
        script([9, 1, 9], [9, 9, 9]), evaluations=evaluations, tolerance=1.0, max_steps=3
    )
    assert solution.steps.tolist() == [7, 11]


def test_one_step_reports_on_the_start():
    solution, final = play([[7.0]], max_steps=1, keep_memory=True)
    assert solution.value.tolist() == [0]
    assert solution.steps.tolist() == [1]
    assert final.memory.tolist() == [1]


def test_a_budget_stops_early_and_never_late():
    merits = script([9, 8, 7, 6, 5, 4])
    for budget, steps in [(2, 2), (6, 6), (99, 6)]:
        solution, _ = play(merits, max_steps=6, budget=jnp.asarray(budget))
        assert solution.steps.tolist() == [steps]
        assert solution.result.tolist() == [Result.max_steps]


def test_stagnates_only_after_many_idle_steps():
    length = 3 * STAGNATION_STEPS
    flat = np.r_[9.0, 8.0, np.full(length, 8.0)]
    falling = 9 * 0.9995 ** np.arange(length + 2)  # two steps make a gain that counts
    falters = np.r_[9.0, np.full(STAGNATION_STEPS - 1, 9.0), 8.0, np.full(length, 8.0)]
    merits = script(flat, falling, falters)
    solution, _ = play(merits, max_steps=length)
    assert solution.result.tolist() == [Result.stagnated, Result.max_steps, Result.stagnated]
    # One iterate sets the mark, and so many more do not beat it.
    assert solution.steps[0] == 2 + STAGNATION_STEPS
    assert solution.steps[2] == 1 + 2 * STAGNATION_STEPS
    assert solution.value[0] == 1
    solution, _ = play(merits, max_steps=length, patience=None)
    assert np.all(solution.result == Result.max_steps)


def test_slow_growth_is_divergence_not_stagnation():
    """Regression: a map that expands by a tenth a step used to stagnate."""
    k = np.arange(100)
    size = 1.1**k
    solution, _ = play(script(size, np.ones(100)), sizes=script(size, np.ones(100)), max_steps=100)
    assert solution.result.tolist() == [Result.diverged, Result.stagnated]
    assert solution.value.tolist() == [0, 0]


def test_slow_convergence_far_from_the_start_is_no_divergence():
    """Regression: at the rounding floor a solution 1e4 times its first iterates was `diverged`."""
    merit = np.r_[0.8 ** np.arange(30), np.full(100, 0.8**29)]
    size = np.r_[np.linspace(1, 1e4, 30), np.full(100, 1e4)]
    solution, _ = play(script(merit), sizes=script(size), max_steps=130)
    assert solution.result.tolist() == [Result.stagnated]
    assert solution.value.tolist() == [29]


def test_stagnation_of_a_negative_merit():
    """Regression: any number just above a negative one used to count as an improvement."""
    solution, _ = play(script(np.full(60, -2.0)), tolerance=-9.0, max_steps=60, patience=9)
    assert solution.result.tolist() == [Result.stagnated]
    assert solution.steps.tolist() == [10]


def test_diverges_once_out_of_proportion_and_keeps_the_best():
    merits = script([9, 8, 7, 1, 9], [9, 8, 7, 6, 5])
    sizes = script([1, 1, 1, 2 * DIVERGENCE_FACTOR, 1], [1, 1, 1, 1, 1])
    solution, _ = play(merits, sizes=sizes, max_steps=5)
    assert solution.result.tolist() == [Result.diverged, Result.max_steps]
    assert solution.steps.tolist() == [4, 5]
    assert solution.value.tolist() == [2, 4]  # the runaway iterate is not trusted, merit or not


def test_what_is_thrown_off_its_solution_has_not_diverged():
    """Regression: it was, at the rounding floor of secants, and its gradient was taken for zero."""
    merits = script([9, 1, 2, 9], [9, 1, 2, 9], [9, 1, 2, np.nan], [9, 1, 2, np.nan])
    options = {"sizes": script([1, 1, 1, 2 * DIVERGENCE_FACTOR], *[[1]] * 3), "max_steps": 5}
    options["sizes"][:, 1] = options["sizes"][:, 0]
    settled = script([0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1])
    solution, _ = play(merits, settled=settled, **options)
    stagnated = Result.stagnated
    assert solution.result.tolist() == [stagnated, Result.diverged, stagnated, Result.non_finite]
    assert solution.value.tolist() == [1, 1, 1, 1]


def test_a_start_at_zero_is_no_yardstick():
    """Regression: sizes were compared with the first alone, so that all after zero was large."""
    rows = {"sizes": [[0.0], [0.1], [1e3], [1e8], [1e8]]}
    solution, _ = play([[5.0], [4.0], [3.0], [2.0], [1.0]], max_steps=5, **rows)
    assert solution.result.tolist() == [Result.max_steps]
    assert solution.value.tolist() == [4]


def test_an_iterate_that_converged_far_away_is_returned():
    """Regression: it was called converged, and another was returned."""
    sizes = [[1.0], [1.0], [1.0], [1e9]]
    solution, _ = play([[5.0], [4.0], [3.0], [0.0]], sizes=sizes, tolerance=0.5, max_steps=4)
    assert solution.result.tolist() == [Result.converged]
    assert solution.value.tolist() == [3]
    assert solution.residual["r"].tolist() == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_report_stops_its_problem_alone(bad):
    merits = script([9, 8, bad, 1, 1], [9, 8, 7, 6, 5], [bad, 1, 1, 1, 1])
    solution, final = play(merits, max_steps=5)
    assert solution.result.tolist() == [Result.non_finite, Result.max_steps, Result.non_finite]
    assert solution.steps.tolist() == [3, 5, 1]
    assert solution.value.tolist() == [1, 4, 0]
    assert solution.residual["r"].tolist() == [8, 5, np.inf]
    assert final.merit.tolist() == [8, 5, np.inf]


class TestGuard:
    """Which iterates compete: those whose guard is within a factor of the lowest so far."""

    def test_in_the_burn_in_the_newest_is_taken(self):
        merits = np.arange(GUARD_BURN_IN, dtype=float)[:, None]
        solution, _ = play(merits, guards=np.ones_like(merits), max_steps=GUARD_BURN_IN)
        assert solution.value.tolist() == [GUARD_BURN_IN - 1]

    def test_a_low_merit_far_from_equilibrium_is_passed_over(self):
        burn = [9.0] * GUARD_BURN_IN
        merits = np.array([*burn, 5, 1, 4, 3])[:, None]
        guards = np.array([*burn, 1, GUARD_SLACK + 0.1, GUARD_SLACK - 0.1, 2])[:, None]
        solution, final = play(merits, guards=guards, max_steps=len(merits))
        assert solution.value.tolist() == [GUARD_BURN_IN + 2]
        assert final.merit.tolist() == [4]

    def test_a_best_iterate_that_fell_behind_is_replaced(self):
        burn = [9.0] * GUARD_BURN_IN
        merits = np.array([*burn, 1, 8, 9])[:, None]
        guards = np.array([*burn, 1, 0.1, 0.2])[:, None]
        solution, _ = play(merits, guards=guards, max_steps=len(merits))
        assert solution.value.tolist() == [GUARD_BURN_IN + 1]

    def test_early_guards_set_no_standard(self):
        """A state at rest while the input has not moved yet must not shut out what follows.

        Regression: the last of them did.
        """
        burn = [0.0] * GUARD_BURN_IN
        merits = np.array([9.0] * GUARD_BURN_IN + [8, 7])[:, None]
        guards = np.array([*burn, 1, 1])[:, None]
        solution, _ = play(merits, guards=guards, max_steps=len(merits))
        assert solution.value.tolist() == [GUARD_BURN_IN + 1]

    def test_a_converged_iterate_wins_whatever_its_merit(self):
        merits = np.array([3.0, 1.0, 2.0])[:, None]

        def step(position, memory, k):
            row = jnp.asarray(merits)[k]
            return position + 1, memory, Report(row, jnp.array([k == 2]), row, row, row + 1)

        start = jnp.zeros(1, jnp.int32)
        report = jax.eval_shape(lambda: step(start, (), 0)[2])
        solution, _ = iterate(lambda _: step, (), start, (), report=report, max_steps=9)
        assert solution.value.tolist() == [2]
        assert solution.result.tolist() == [Result.converged]


class TestHistory:
    merits = script([9, 1, 8, 8], [9, 7, np.nan, 5], [4, 3, 2, 1])

    def test_is_absent_unless_asked_for(self):
        solution, _ = play(self.merits, max_steps=4)
        assert solution.history is None

    def test_has_a_row_a_step_and_nan_after_a_problem_ended(self):
        solution, _ = play(self.merits, tolerance=1.0, max_steps=6, record=True)
        nan = np.nan
        want = [[9, 9, 4], [1, 7, 3], [nan, nan, 2], [nan, nan, 1], [nan] * 3, [nan] * 3]
        np.testing.assert_array_equal(solution.history.residual["r"], want)
        np.testing.assert_array_equal(solution.history.merit, want)
        assert solution.history.record is None

    def test_records_a_function_of_the_iterate(self):
        solution, _ = play(
            self.merits,
            tolerance=1.0,
            max_steps=6,
            record=lambda position: {"twice": 2 * position, "sum": jnp.sum(position)},
        )
        # A finished problem's iterate stays where it is; rows that were not run are zero.
        assert solution.history.record["twice"].tolist() == [
            [0, 0, 0],
            [2, 2, 2],
            [2, 4, 4],
            [2, 4, 6],
            [0, 0, 0],
            [0, 0, 0],
        ]
        assert solution.history.record["sum"].tolist() == [0, 3, 5, 6, 0, 0]


def test_a_refined_iterate_is_what_is_kept_and_recorded():
    def step(position, memory, k):
        row = (10.0 - k)[None]
        report = Report(row, row < 0, row, None, row, refined=position + 100)
        return position + 1, memory, report

    start = jnp.zeros(1, jnp.int32)
    report = jax.eval_shape(lambda: step(start, (), jnp.zeros((), jnp.int32))[2])
    solution, _ = iterate(
        lambda _: step, (), start, (), report=report, max_steps=3, record=lambda s: s
    )
    assert solution.value.tolist() == [102]
    assert solution.history.record.tolist() == [[100], [101], [102]]
