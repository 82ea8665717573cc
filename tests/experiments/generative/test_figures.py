"""What figures and exported images show is what they say."""

from __future__ import annotations

import numpy as np
from PIL import Image

from experiments.common.data import ArrayImages, ImageData, Split
from experiments.generative import figures
from experiments.generative.distributions import Samples
from experiments.generative.export import write_images
from experiments.generative.figures import nearest_indices


def test_the_nearest_of_images_that_are_there_is_themselves():
    among = np.random.default_rng(0).random((20, 4, 4, 1), np.float32)
    chosen = np.array([7, 0, 19])
    np.testing.assert_array_equal(nearest_indices(among[chosen] + 0.001, among), chosen)


def test_few_images_are_interpolated_between_over_and_over(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        figures, "generate", lambda generator, params, x: drawn.append(x) or Samples(x, x)
    )
    monkeypatch.setattr(figures.plots, "image_grid", lambda *_: None)
    latents = np.arange(9, dtype=np.float32).reshape(3, 3)
    data = ImageData("few", Split(ArrayImages(np.zeros((3, 1, 1, 1)))), Split(None))
    figures.interpolation(tmp_path / "a.png", None, None, latents, data)
    lines = drawn[0].reshape(5, figures.SHOWN, 3)
    np.testing.assert_array_equal(lines[:, 0], latents[[0, 2, 1, 0, 2]])
    np.testing.assert_array_equal(lines[:, -1], latents[[1, 0, 2, 1, 0]])


def test_exported_images_are_read_back(tmp_path):
    for channels in (1, 3):
        images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, channels)) / 255
        write_images(tmp_path / str(channels), images)
        files = sorted((tmp_path / str(channels)).iterdir())
        assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
        back = np.stack([np.asarray(Image.open(file)) for file in files]).reshape(images.shape)
        np.testing.assert_allclose(back / 255, images, atol=1e-6)


def test_exported_images_are_clipped(tmp_path):
    write_images(tmp_path, np.array([[[[-0.2]], [[1.3]]]]))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "00000.png")), [[0], [255]])
