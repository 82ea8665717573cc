"""Settings of the generative task, and its presets.

Each preset says which command runs it, how long it takes and what to expect of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from experiments.common.accuracy import AccuracyControl

StateDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Attributes:
        dataset: Name of the images, see `experiments.common.data`.
        image_size: (height, width) to resize to; None keeps the data set's.
        generator: `dense`, one fully connected state; `multiscale`, convolutional branches.
        hidden: Width of the dense generator's state.
        decoder_hidden: Width of its decoder's hidden layer.
        contraction: Bound on the spectral norm of the dense cell's recurrent kernel.
        state_dtype: Of equilibrium states and adjoints, and of the cell's products with them.
            Parameters, optimisers, latents, norms, residuals and decoders are float32 with either.
        channels: Channels of the multiscale generator's branches, finest first.
        latent_dim: Dimension of the latent code x.
        steps: Training steps.
        batch_size: Images a step.
        augment_flip: Whether half of the training images are mirrored, left to right, by chance.
            This and the further `augment_` settings act on every training of the generator, joint,
            nested and as a decoder; an image is transformed anew in every step.
        augment_shift: Largest shift along either axis, as a share of the image's side.
        augment_zoom: Largest logarithm of the factor by which either side is stretched.
        augment_contrast: Largest logarithm of the factor by which values are spread about the mean.
        augment_brightness: Largest value added to all pixels.
        learning_rate: First rate of AdamW on the parameters; it falls to zero along a cosine.
        weight_decay: Of AdamW.
        gradient_clip: Largest norm of the gradient; longer ones are scaled down.
        jacobian_weight: Weight of the penalty `||df/dz||_F^2 / dim z` at the equilibrium.
        jacobian_probes: Random vectors that estimate it.
        latent_penalty: Weight of `||x||^2` in the objective.
        inner_steps: Iterations of the joint solve in training; at most, with `error_allowed`.
        inner_step_size: First step of Adam on x; it falls along a cosine over the iterations.
        error_allowed: Relative errors of the envelope gradient that are allowed at the first step
            of the joint training and at the last, (loose, tight), as its residuals estimate them;
            None spends `inner_steps` iterations on every step. In between it falls geometrically,
            and the number of iterations follows (`experiments.common.accuracy`). On digits it saves
            a seventh of the time for 0.04 dB, but a fixed 30 does as well (RESULTS.md); the true
            error of a batch's gradient is there about three times the estimate.
        least_inner_steps: Fewest iterations of the joint solve with `error_allowed`.
        warm_starts: Training images, at most, whose next solve starts from their last x; 0 starts
            all from zero. It goes with fewer iterations and a smaller first step.
        vae_steps: Training steps of the variational autoencoder, of the same batch size.
        kl_weight: Weight of its Kullback-Leibler divergence beside the sum of squared errors of an
            image. Twice the mean squared error of a pixel makes both the likelihood of Gaussian
            noise as large as that error; much more switches latents off, and reconstruction
            suffers.
        nested_steps: Training steps of the generator that is trained by nested solves; about as
            many as fit into the time of the joint training.
        nested_inner_steps: Steps on x of its nested solves, which start at `inner_step_size`.
        classifier_steps: Training steps of the classifier whose features compare distributions.
        evaluation_steps: Iterations of the joint solve on test images.
        evaluation_nested_steps: Steps on x of the nested solve on test images.
        evaluation_batch: Images solved at once in the evaluation.
        mixture_components: Components of the Gaussian mixture on the training latents.
        mixture_images: Training images whose latents the mixture is fitted to, at most.
        speed_problems: Test images of the speed measurement, at most; others tune the methods.
        speed_joint_steps: Lengths of the joint solve among which its tuning chooses.
        speed_joint_rates: First steps among which it chooses.
        speed_relaxations: Of state and adjoint, among which it chooses.
        speed_nested_steps: Optimiser steps among which the tuning of the nested method chooses.
        speed_nested_rates: Learning rates among which it chooses.
        log_every: Training steps between rows of metrics.
        checkpoint_every: Training steps between checkpoints.

    Raises:
        ValueError: `error_allowed` or `least_inner_steps` is out of range.
    """

    dataset: str
    image_size: tuple[int, int] | None
    generator: Literal["dense", "multiscale"]
    latent_dim: int
    steps: int
    hidden: int = 512
    decoder_hidden: int = 512
    contraction: float = 0.9
    state_dtype: StateDtype = "float32"
    channels: tuple[int, ...] = ()
    batch_size: int = 64
    augment_flip: bool = False
    augment_shift: float = 0.0
    augment_zoom: float = 0.0
    augment_contrast: float = 0.0
    augment_brightness: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    gradient_clip: float = 10.0
    jacobian_weight: float = 0.0
    jacobian_probes: int = 1
    latent_penalty: float = 1e-3
    inner_steps: int = 40
    inner_step_size: float = 0.3
    error_allowed: tuple[float, float] | None = None
    least_inner_steps: int = 10
    warm_starts: int = 0
    vae_steps: int = 2000
    kl_weight: float = 0.01
    nested_steps: int = 400
    nested_inner_steps: int = 20
    classifier_steps: int = 600
    evaluation_steps: int = 300
    evaluation_nested_steps: int = 100
    evaluation_batch: int = 256
    mixture_components: int = 20
    mixture_images: int = 4096
    speed_problems: int = 256
    speed_joint_steps: tuple[int, ...] = (40, 60, 80)
    speed_joint_rates: tuple[float, ...] = (0.2, 0.3, 0.5)
    speed_relaxations: tuple[float, ...] = (1.0, 1.6)
    speed_nested_steps: tuple[int, ...] = (20, 40, 80)
    speed_nested_rates: tuple[float, ...] = (0.1, 0.3, 0.6)
    log_every: int = 20
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        _ = self.accuracy_control  # refuses settings out of range

    @property
    def accuracy_control(self) -> AccuracyControl | None:
        """What decides on the iterations of the joint training; None if they are `inner_steps`."""
        if self.error_allowed is None:
            return None
        first, last = self.error_allowed
        return AccuracyControl(first, last, self.least_inner_steps, self.inner_steps, self.steps)


_DIGITS = Config(
    dataset="digits",
    image_size=None,
    generator="dense",
    latent_dim=16,
    steps=2000,
    vae_steps=1500,
    nested_steps=200,
    speed_joint_steps=(60, 80),
    speed_relaxations=(1.6,),
    speed_nested_steps=(40, 80),
)

_CELEBA = Config(
    dataset="celeba",
    image_size=None,
    generator="multiscale",
    latent_dim=128,
    steps=220 * 3391,
    channels=(32, 64, 128, 256),
    batch_size=48,
    weight_decay=0.0,
    gradient_clip=1e4,
    # Published: 2 beside the mean over 12,288 values in [-1, 1]; here the error is the sum over
    # values in [0, 1], so 2 * 12,288 / 4.
    jacobian_weight=6144.0,
    jacobian_probes=2,
    latent_penalty=0.0,
    # Published: one beside the squared error of images in [-1, 1].
    kl_weight=0.25,
    vae_steps=220 * 3391,
    inner_steps=100,
    inner_step_size=0.1,
    evaluation_batch=64,
    speed_problems=64,
    log_every=100,
    checkpoint_every=2000,
)

PRESETS = {
    # python -m experiments.generative --preset smoke
    # Shows within a minute on 2 CPU cores that everything works; its numbers mean nothing.
    "smoke": replace(
        _DIGITS,
        steps=60,
        hidden=64,
        inner_steps=20,
        inner_step_size=0.1,
        warm_starts=1024,
        vae_steps=60,
        nested_steps=20,
        classifier_steps=100,
        evaluation_steps=60,
        evaluation_nested_steps=20,
        mixture_components=4,
        mixture_images=256,
        speed_problems=32,
        speed_joint_steps=(60,),
        speed_joint_rates=(0.3,),
        speed_relaxations=(1.0,),
        speed_nested_steps=(30,),
        speed_nested_rates=(0.3,),
        checkpoint_every=20,
        log_every=10,
    ),
    # python -m experiments.generative
    # Four minutes on 2 CPU cores, a third of them the joint training: 25.7 dB on the test images,
    # where PCA has 19.4. The autoencoder and the nested training get a quarter of what they want,
    # and of lengths the speed measurement tries those that have been chosen before.
    "digits": _DIGITS,
    # python -m experiments.generative --preset digits-study
    # Five minutes on 2 CPU cores: the autoencoder reaches 23.0 dB, nested training 25.4.
    "digits-study": replace(
        _DIGITS,
        vae_steps=6000,
        nested_steps=700,
        speed_joint_steps=(40, 60, 80),
        speed_nested_steps=(20, 40, 80),
    ),
    # python -m experiments.generative --preset digits-warm
    # Half the iterations, from each image's last latent: three fifths of the training time. One
    # seed without evaluation of speed: 25.5 dB, where 23 iterations from zero reach 25.1.
    "digits-warm": replace(_DIGITS, inner_steps=20, inner_step_size=0.1, warm_starts=2048),
    # python -m experiments.generative --preset digits-controlled
    # As many iterations as keep the estimated error of the gradient at what is allowed, 22 at first
    # and 33 to 46 at last: 25.6 dB in six sevenths of the training time. 30 throughout reach 25.7.
    "digits-controlled": replace(_DIGITS, inner_steps=80, error_allowed=(0.3, 0.15)),
    # python -m experiments.generative --preset digits-bfloat16
    # Shows what bfloat16 states do to the result. On a CPU, which emulates them, it saves no time.
    "digits-bfloat16": replace(_DIGITS, state_dtype="bfloat16"),
    # python -m experiments.generative --preset mnist
    # Half an hour on one CPU core to itself, 13 minutes of it the joint training: 29.2 dB on 10,000
    # test images, where the autoencoder has 22.3, nested training 27.5 and PCA 20.4.
    "mnist": Config(
        dataset="mnist",
        image_size=None,
        generator="dense",
        latent_dim=64,
        steps=6000,
        latent_penalty=1e-2,
        vae_steps=12000,
        nested_steps=2700,
        nested_inner_steps=40,
        evaluation_nested_steps=40,
        checkpoint_every=500,
    ),
    # python -m experiments.generative --preset faces
    # Nine minutes on one CPU core that other work shared: 23.6 dB on people never seen in training,
    # where the autoencoder has 21.7, nested training 23.4, PCA 22.3 (on transformed images 23.6).
    # A multiscale generator of 8, 16 and 32 channels is out of reach: its autoencoder had not made
    # ten steps, compilation included, in the time in which the dense one's makes 5,000.
    "faces": Config(
        dataset="faces",
        image_size=(48, 40),
        generator="dense",
        latent_dim=64,
        steps=2500,
        hidden=256,
        decoder_hidden=256,
        batch_size=32,
        augment_flip=True,
        augment_shift=0.04,
        augment_zoom=0.06,
        augment_contrast=0.15,
        augment_brightness=0.05,
        weight_decay=0.1,
        inner_steps=60,
        vae_steps=5000,
        nested_steps=1000,
        nested_inner_steps=40,
        evaluation_batch=40,
        mixture_components=5,
        speed_joint_steps=(60, 80),
        speed_relaxations=(1.6,),
        speed_nested_steps=(40, 80),
        checkpoint_every=500,
    ),
    # python -m experiments.generative --preset cifar10
    # 29 minutes on half a CPU core or less: 20.7 dB, as PCA, where the autoencoder has 19.5 and
    # nested training 19.8. 300 iterations do not solve the trained model's inner problems
    # (stationarity 0.015).
    "cifar10": Config(
        dataset="cifar10",
        image_size=None,
        generator="dense",
        latent_dim=64,
        steps=2000,
        hidden=256,
        decoder_hidden=384,
        batch_size=32,
        augment_flip=True,
        weight_decay=0.1,
        inner_steps=60,
        vae_steps=4000,
        nested_steps=600,
        nested_inner_steps=40,
        evaluation_nested_steps=40,
        mixture_images=1024,
        speed_problems=64,
        speed_joint_steps=(60, 80),
        speed_relaxations=(1.6,),
        speed_nested_steps=(40, 80),
        checkpoint_every=500,
    ),
    # python -m experiments.generative --preset celeba-published
    # The published size: 40.8 million parameters, 220 epochs of 48 images. It wants a GPU.
    "celeba-published": _CELEBA,
    # python -m experiments.generative --preset celeba-bfloat16
    # The same with states and adjoints of half the size.
    "celeba-bfloat16": replace(_CELEBA, state_dtype="bfloat16"),
}
