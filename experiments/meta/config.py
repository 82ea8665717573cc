"""Settings of few-shot learning, and its presets.

Each preset says which command runs it, how long it takes and what to expect of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OuterGradient = Literal["kkt", "state", "unrolled"]
Baseline = Literal["proto", "maml", "fomaml", "imaml"]


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Attributes:
        dataset: `sinusoid` (drawn at random), `digits` (embedded; classes are digits times four
            rotations), or `omniglot`.
        network: `dense`, `compact`, or `multiscale`, the published one.
        channels: Width of the dense state; channels of the compact network's injection and state;
            or of the multiscale branches, finest first.
        context: Numbers of the context vector of a task.
        head: `prototypes`, or a `linear` map that all tasks share.
        fast_head: Whether what is added to the head is among the fast parameters.
        steps: Training steps.
        strides: Of the two convolutions of the compact network's injection.
        contraction: Bound on the Lipschitz constant of the dense and compact cells.
        ways: Classes of a training task.
        shots: Support examples a class in training; of a sinusoid, all support examples.
        queries: Query examples a class in training; of a sinusoid, all query examples.
        tasks: Tasks a training step.
        distort: Whether training's classes and images undergo random affine maps.
        inner: Fast parameters from the joint or from the nested solve in training.
        inner_steps: Iterations of the joint solve in training.
        inner_step: First step of Adam on x in it; it falls along a cosine.
        inner_rtol: Tolerance at which a task stops before that.
        nested_steps: Optimiser steps of the nested solve.
        nested_rate: Its learning rate.
        query_steps: Limit on the steps of the queries' equilibrium.
        query_rtol: Its relative tolerance.
        outer_gradient: `kkt`, exact through the fast parameters; `state`, first order: they are
            constants; `unrolled`, through the joint iteration.
        outer_steps: Limit on the steps of the outer gradient's linear solve.
        outer_rtol: Its relative tolerance.
        learning_rate: First rate of AdamW on the parameters; it falls to zero along a cosine.
        weight_decay: Of AdamW.
        gradient_clip: Largest norm of the gradient; longer ones are scaled down.
        jacobian_weight: Weight of the penalty `||df/dz||_F^2 / dim z` on the support's equilibria.
        baselines: Trained on the same tasks, each with its number of training steps.
        settings: (ways, shots) that the evaluation tests.
        test_tasks: Test tasks of each.
        test_queries: Query examples a class of a test task.
        speed_tasks: Test tasks of the speed measurement, half of them to tune the methods.
        speed_steps: Lengths of the solves, joint and nested, among which it chooses.
        speed_rates: Adam's learning rates, or first steps, among which it chooses.
        speed_momentum_rates: Likewise of gradient descent with momentum: square roots of its steps;
            it is left out if there are none.
        speed_relaxation: Of state and adjoint in the joint solve there.
        log_every: Training steps between rows of metrics.
        checkpoint_every: Training steps between checkpoints.
    """

    dataset: Literal["sinusoid", "digits", "omniglot"]
    network: Literal["dense", "compact", "multiscale"]
    channels: tuple[int, ...]
    context: int
    head: Literal["prototypes", "linear"]
    fast_head: bool
    steps: int
    strides: tuple[int, int] = (2, 2)
    contraction: float = 0.9
    ways: int = 20
    shots: int = 1
    queries: int = 5
    tasks: int = 1
    distort: bool = False
    inner: Literal["joint", "nested"] = "joint"
    inner_steps: int = 12
    inner_step: float = 0.05
    inner_rtol: float = 1e-3
    nested_steps: int = 20
    nested_rate: float = 0.1
    query_steps: int = 12
    query_rtol: float = 1e-2
    outer_gradient: OuterGradient = "kkt"
    outer_steps: int = 12
    outer_rtol: float = 3e-2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    gradient_clip: float = 10.0
    jacobian_weight: float = 0.0
    baselines: tuple[tuple[Baseline, int], ...] = ()
    settings: tuple[tuple[int, int], ...] = ((5, 1), (5, 5), (20, 1), (20, 5))
    test_tasks: int = 600
    test_queries: int = 15
    speed_tasks: int = 64
    speed_steps: tuple[int, ...] = (10, 20, 40)
    speed_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    speed_momentum_rates: tuple[float, ...] = (0.1, 0.3, 1.0)
    speed_relaxation: float = 1.0
    log_every: int = 20
    checkpoint_every: int = 200


_SINUSOID = Config(
    dataset="sinusoid",
    network="dense",
    channels=(64,),
    context=32,
    head="linear",
    fast_head=True,
    steps=3000,
    ways=1,
    shots=10,
    queries=10,
    tasks=16,
    inner_steps=30,
    inner_step=0.1,
    baselines=(("maml", 3000), ("fomaml", 3000), ("imaml", 3000)),
    settings=((1, 5), (1, 10)),
    test_queries=100,
    speed_tasks=256,
    speed_steps=(20, 40, 80),
    speed_rates=(0.03, 0.1, 0.3),
)

PRESETS: dict[str, Config] = {
    # python -m experiments.meta --preset smoke
    # Shows within a minute on 2 CPU cores that everything works; its numbers mean nothing.
    "smoke": Config(
        dataset="digits",
        network="dense",
        channels=(32,),
        context=8,
        head="prototypes",
        fast_head=True,
        steps=60,
        ways=5,
        baselines=(("proto", 30), ("maml", 30), ("imaml", 30)),
        test_queries=5,
        speed_tasks=16,
        speed_steps=(20,),
        speed_rates=(0.03,),
        speed_momentum_rates=(),
        log_every=10,
        checkpoint_every=20,
    ),
    # python -m experiments.meta
    # The joint learner trains in half a minute on 2 CPU cores, all of it takes less than three:
    # squared error 0.65 from ten examples, where MAML has 0.93.
    "sinusoid": _SINUSOID,
    # python -m experiments.meta --preset omniglot-small
    # 52 minutes on one CPU core, 19 of them the learner's training: 97.6 % 5-way 1-shot, 90.6 %
    # 20-way 1-shot, where prototypes have 97.5 and 90.0 %. The trainings of MAML are short.
    "omniglot-small": Config(
        dataset="omniglot",
        network="compact",
        channels=(32, 64),
        context=32,
        head="prototypes",
        fast_head=True,
        steps=8000,
        queries=4,
        distort=True,
        inner_steps=10,
        inner_step=0.006,
        learning_rate=2e-3,
        baselines=(("proto", 8000), ("maml", 1500), ("fomaml", 1500), ("imaml", 1500)),
        test_queries=5,
        speed_tasks=32,
        speed_steps=(12, 20),
        speed_rates=(0.005, 0.01, 0.02),
        speed_momentum_rates=(1.25, 1.5, 1.75, 1.9),
        speed_relaxation=1.3,
    ),
    # python -m experiments.meta --preset omniglot-published
    # The published size, 2,345,093 parameters, and 2 million tasks. It wants a GPU, and has not
    # been run.
    "omniglot-published": Config(
        dataset="omniglot",
        network="multiscale",
        channels=(64, 128),
        context=400,
        head="linear",
        fast_head=False,
        steps=25_000,
        ways=5,
        tasks=80,
        inner_steps=100,
        inner_step=0.04,
        query_steps=40,
        outer_steps=40,
        gradient_clip=1e4,
        jacobian_weight=0.5,
        settings=((5, 1), (5, 5)),
        log_every=50,
        checkpoint_every=500,
    ),
}
