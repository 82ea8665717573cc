"""Settings of the adversarial task, and its presets.

Each preset says which command runs it, how long it takes and what to expect of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from experiments.adversarial.contractive import ContractiveConfig
from experiments.adversarial.model import ClassifierConfig
from experiments.adversarial.problem import Norm, Sizes


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Attributes:
        dataset: Name of the images, see `experiments.common.data`.
        radius: Of the ball that perturbations lie in.
        norm: Of that ball.
        steps: Training steps of each model.
        classifier: `contractive`, small and for a CPU; `published`, the paper's.
        stem: Channels of the contractive classifier's first convolution.
        width: Channels of its state.
        features: Width of its hidden layer.
        strides: Of its first two convolutions.
        contraction: Bound on the norm of its recurrent convolution.
        batch_size: Images a step.
        learning_rate: First rate of AdamW on the parameters; it falls to zero along a cosine.
        weight_decay: Of AdamW.
        gradient_clip: Largest norm of the gradient; longer ones are scaled down.
        ramp: Share of the steps over which the radius of training grows from zero.
        jacobian_weight: Weight of the penalty `||df/dz||_F^2 / dim z` at the equilibrium.
        jacobian_probes: Random vectors that estimate it.
        solve_steps: Limit on the steps of the clean model's solves.
        joint_steps: Iterations of the joint attack in training.
        joint_rate: Its first step, in radii.
        pgd: How the nested attack of training solves: `published`, 20 steps of cold solves of 18
            steps each way; `warm`, `pgd_steps` steps of solves from the last ones to a relative
            residual of 1e-2.
        pgd_steps: Steps of the warm variant.
        attack_steps: Iterations of the joint attack in the evaluation.
        attack_rate: Its first step, in radii.
        attack_momentum: Its momentum.
        attack_hold: Iterations in which the perturbation waits for state and adjoint; those of the
            speed measurement, too.
        evaluation_images: Test images that all attacks share, at most.
        evaluation_batch: Images attacked at once.
        long_steps: Steps of the strongest PGD.
        restarts: Its starts.
        radii: Radii of the curve of robust accuracy, in units of `radius`.
        speed_problems: Test images of the speed measurement, at most; others tune the methods.
        speed_joint_steps: Length of its joint attacks.
        speed_joint_rates: First steps among which their tuning chooses, in radii.
        speed_relaxations: Relaxations of state and adjoint among which it chooses.
        speed_nested_steps: Length of its nested attacks.
        speed_nested_rates: Steps' lengths among which their tuning chooses, in radii.
        speed_momenta: Momenta among which both choose; PGD without is a candidate, too.
        log_every: Training steps between rows of metrics.
        checkpoint_every: Training steps between checkpoints.
    """

    dataset: str
    radius: float
    steps: int
    norm: Norm = "l2"
    classifier: Literal["contractive", "published"] = "contractive"
    stem: int = 24
    width: int = 48
    features: int = 128
    strides: tuple[int, int] = (2, 2)
    contraction: float = 0.9
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    gradient_clip: float = 10.0
    ramp: float = 0.3
    jacobian_weight: float = 0.0
    jacobian_probes: int = 1
    solve_steps: int = 30
    joint_steps: int = 10
    joint_rate: float = 4.0
    pgd: Literal["published", "warm"] = "warm"
    pgd_steps: int = 7
    attack_steps: int = 20
    attack_rate: float = 2.0
    attack_momentum: float = 0.7
    attack_hold: int = 2
    evaluation_images: int = 1000
    evaluation_batch: int = 250
    long_steps: int = 100
    restarts: int = 5
    radii: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    speed_problems: int = 256
    speed_joint_steps: int = 48
    speed_joint_rates: tuple[float, ...] = (2.0, 4.0)
    speed_relaxations: tuple[float, ...] = (1.0, 1.25)
    speed_nested_steps: int = 20
    speed_nested_rates: tuple[float, ...] = (2.0, 8.0)
    speed_momenta: tuple[float, ...] = (0.6, 0.8)
    log_every: int = 20
    checkpoint_every: int = 200

    def with_published_pgd(self) -> Config:
        """The same, but for the nested attack of training, which becomes the published one."""
        return replace(self, pgd="published")

    def sizes(self, image_shape: tuple[int, int, int]) -> Sizes:
        """Sizes of the classifier for images of this shape."""
        if self.classifier == "published":
            return ClassifierConfig(image_shape)
        return ContractiveConfig(
            image_shape,
            stem=self.stem,
            width=self.width,
            features=self.features,
            strides=self.strides,
            contraction=self.contraction,
        )


_DIGITS = Config(
    dataset="digits", radius=0.5, steps=1500, strides=(1, 2), stem=16, width=32, features=64
)
_PUBLISHED = Config(
    dataset="mnist",
    radius=1.0,
    steps=10 * 625,
    classifier="published",
    batch_size=96,
    learning_rate=1e-3,
    weight_decay=0.0,
    ramp=0.1,
    jacobian_weight=0.01,
    jacobian_probes=2,
    solve_steps=40,
    joint_steps=20,
    pgd="published",
)

PRESETS = {
    # python -m experiments.adversarial --preset smoke
    # Shows within a minute on 2 CPU cores that everything works; its numbers mean nothing.
    "smoke": replace(
        _DIGITS,
        steps=40,
        stem=8,
        width=8,
        features=16,
        pgd_steps=3,
        joint_steps=5,
        evaluation_images=64,
        evaluation_batch=64,
        long_steps=10,
        restarts=2,
        radii=(0.5, 1.0),
        speed_problems=32,
        speed_joint_steps=12,
        speed_joint_rates=(2.0,),
        speed_relaxations=(1.0,),
        speed_nested_steps=10,
        speed_nested_rates=(2.0,),
        speed_momenta=(0.5,),
        log_every=10,
        checkpoint_every=20,
    ),
    # python -m experiments.adversarial
    # Five minutes of processor time. Joint-trained: 98.9 % clean, 79.2 to 79.7 % under PGD-100 with
    # 5 restarts; PGD-trained 98.6 and 78.9 to 80.0, clean-trained 97.1 and 45.6 to 49.7.
    "digits": _DIGITS,
    # python -m experiments.adversarial --preset digits-linf
    # The same with a ball of the linf norm.
    "digits-linf": replace(_DIGITS, norm="linf", radius=0.1),
    # python -m experiments.adversarial --preset mnist-small
    # 36 minutes on one CPU core, 16 of them the three trainings. Joint-trained: 98.6 % clean and
    # 90.6 % under PGD-100 with 5 restarts; PGD-trained 98.6 and 90.2, clean-trained 98.0 and 37.6.
    "mnist-small": Config(dataset="mnist", radius=1.0, steps=2720),
    # The published sizes want a GPU; not measured yet.
    "mnist-published": _PUBLISHED,
    # Ten to twenty minutes of processor time. Five epochs of a subset: 39 % clean and 27 % under
    # PGD-100 with 5 restarts, joint- and PGD-trained alike.
    "cifar-small": Config(
        dataset="cifar10",
        radius=0.5,
        steps=400,
        stem=16,
        ramp=0.5,
        evaluation_images=500,
        speed_problems=128,
    ),
    "cifar-published": replace(_PUBLISHED, dataset="cifar10", steps=20 * 521),
}
