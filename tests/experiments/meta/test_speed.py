"""The working memory of a training step, as XLA plans it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.meta.speed import step_memory
from tests.experiments.meta.learners import CLASSES, learner_of


@pytest.mark.slow
def test_memory_of_an_implicit_step_does_not_grow_with_the_inner_iterations():
    learner, params, tasks = learner_of(replace(CLASSES, channels=(64,)))
    memory = step_memory(learner, params, tasks)
    assert memory["kkt"][1] <= 1.02 * memory["kkt"][0]
    assert memory["unrolled"][1] > 1.5 * memory["unrolled"][0]
