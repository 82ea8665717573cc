"""The joint solve against the published joint method, on a generator trained by this project.

    python -m experiments.benchmarks.published_method --run-dir RUN --output published.json

Both are measured as the nested method is (`experiments.common.speed`): time of the batch until a
problem's objective, at the re-solved equilibrium of its input, is within 1 % of the way from the
best that any method found back to the start. The published method runs with its published step,
and with the best of steps 4, 16, ... times as long, chosen on validation problems: its step suits
the scale of its own generator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

import jdeq
from experiments.benchmarks.timing import surroundings
from experiments.common.data import load_images
from experiments.common.runs import open_run
from experiments.common.speed import Candidate, Comparison, Measured, compare, joint_candidate
from experiments.generative.config import Config
from experiments.generative.evaluate import load_generator
from experiments.generative.speed import joint_candidates, speed_problems

_STRETCHES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Factors of x, whose squares are those of a gradient step."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        run_dir: a run of ``experiments.generative``.
        output: JSON file to write.
        data_root: folder of the data sets; None is the usual place.
    """

    run_dir: Path
    output: Path
    data_root: Path | None = None


def main(options: Options) -> None:
    """Print and write the result."""
    run = open_run(options.run_dir, "generative")
    config = run.record.settings_as(Config)
    data = load_images(config.dataset, options.data_root, config.image_size)
    generator, restored = load_generator(config, run, data.shape)
    validation, test = speed_problems(generator, restored.state.params, data, config)
    comparison = compare(
        generator.problem,
        validation,
        test,
        joint=joint_candidates(config),
        nested=[published_method(_STRETCHES)],
        published=published_method((1.0,)),
    )
    result = surroundings("flax", "optax") | {
        "run": {"preset": run.record.preset, "seed": run.record.seed},
        "problems": len(test.target),
        "joint": outcome(comparison, comparison.joint),
        "published, step tuned": outcome(comparison, comparison.nested),
        "published": outcome(comparison, comparison.published),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def published_method(stretches: tuple[float, ...]) -> Candidate:
    """The method of Gurumurthy et al. (2021) with the settings of their generator."""
    settings = jdeq.joint.published("celeba")
    return joint_candidate("published", settings["method"], settings["max_steps"], stretches)


def outcome(comparison: Comparison, method: Measured) -> dict[str, object]:
    """Time over the joint solve's of all problems, as sorted quartiles, and the share that arrives.

    A problem that never arrives counts as infinite, written as a text.
    """
    ratios = sorted(comparison.speedup(method))
    count = len(ratios)
    quartiles = [ratios[(count - 1) * share // 4] for share in (1, 2, 3)]
    return {
        "method": method.name,
        "time_over_joint_quartiles": [f"{ratio:.3g}" for ratio in quartiles],
        "share_reached": method.share_reached,
        "seconds_in_all": float(method.seconds[-1]),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
