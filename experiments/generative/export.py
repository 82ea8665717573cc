"""Images as png files, for tools that compare folders of images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.common.data import load_images
from experiments.common.files import write_atomically
from experiments.common.runs import RunDirectory
from experiments.common.terminal import say
from experiments.generative.config import Config
from experiments.generative.distributions import MOST
from experiments.generative.evaluate import draw_samples, load_generator

_FOLDER = "export"


def export(config: Config, run: RunDirectory, data_root: Path | None) -> None:
    """Write samples of each sampler, and the real images, to folders below `export/`.

    joint_normal, joint_mixture, joint_auxiliary, vae_prior, vae_mixture, test and train: as many
    files in each as there are test images, at most 10,000, by the names 00000.png and so on.

    Raises:
        UserError: There is no checkpoint yet, or the images are not of the size trained on.
    """
    data = load_images(config.dataset, data_root, config.image_size)
    generator, restored = load_generator(config, run, data.shape)
    joint, vae = draw_samples(config, run, data, generator, restored.state.params)
    count = min(len(data.test), len(data.train), MOST)
    folders = {f"joint_{name}": drawn.images for name, drawn in joint.items()}
    folders |= {f"vae_{name}": drawn.images for name, drawn in vae.items()}
    folders |= {"test": data.test.first(count), "train": data.train.first(count)}
    for name, images in folders.items():
        folder = run.path / _FOLDER / name
        write_images(folder, images[:count])
        say(f"{min(count, len(images))} images written to {folder}")


def write_images(folder: Path, images: np.ndarray) -> None:
    """Write images [N, H, W, C] in [0, 1], C 1 or 3, as 00000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)
    for number, image in enumerate(pixels):
        content = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(content, "png")
        write_atomically(folder / f"{number:05d}.png", content.getvalue())
