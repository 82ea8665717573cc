"""The classifier of a run as a function of images, for attacks of other makers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jax import Array

from experiments.adversarial.config import Config
from experiments.adversarial.evaluate import load_victims
from experiments.adversarial.train import MODELS
from experiments.common.errors import UserError
from experiments.common.runs import open_run


def load_predict(
    run_dir: Path, image_shape: tuple[int, int, int], model: str = "joint"
) -> Callable[[Array], Array]:
    """`predict(images) -> logits` of a trained model.

        predict = load_predict(Path("runs/adversarial/digits"), (8, 8, 1))
        gradient = jax.grad(lambda images: predict(images)[:, 3].sum())(images)

    Args:
        run_dir: directory of a run of the adversarial task.
        image_shape: height, width and channels of its images.
        model: `clean`, `pgd` or `joint`.

    Returns:
        A function of jax arrays [N, H, W, C] in [0, 1] to logits [N, classes] at the equilibria.
        It may be jitted and differentiated; its gradients are the implicit ones.

    Raises:
        UserError: the directory holds no such model.
    """
    if model not in MODELS:
        raise UserError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}.")
    run = open_run(run_dir, "adversarial")
    victims, _ = load_victims(run.record.settings_as(Config), run, image_shape)
    if model not in victims:
        raise UserError(f"{run_dir} has no checkpoint of the {model}-trained model yet.")
    return victims[model].predict
