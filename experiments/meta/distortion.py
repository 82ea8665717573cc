"""Random affine distortions of training tasks, so that few characters make many classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from experiments.common.data.tasks import Tasks, TaskSampler

_INK = 0.48  # of a sampled pixel: lines neither break nor swell


@dataclass(frozen=True)
class Distortion:
    """Ranges from which an affine map is drawn, each even on both sides of the identity.

    Attributes:
        turn: radians.
        shear: tangent of the angle.
        stretch: logarithm of the scale, drawn for height and width apart.
        shift: pixels.
    """

    turn: float
    shear: float
    stretch: float
    shift: float

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """`count` maps of (row, column, 1) about an image's centre, [count, 3, 3]."""
        turn, shear, *numbers = random.uniform(-1, 1, (6, count))
        turn, shear = self.turn * turn, self.shear * shear
        height, width = np.exp(self.stretch * np.stack(numbers[:2]))
        maps = np.zeros((count, 3, 3))
        maps[:, 0, 0], maps[:, 0, 1] = height * np.cos(turn), -width * np.sin(turn)
        maps[:, 1, 0], maps[:, 1, 1] = height * np.sin(turn), width * np.cos(turn)
        maps[:, :2, 1] += shear[:, None] * maps[:, :2, 0]
        maps[:, :2, 2] = self.shift * np.stack(numbers[2:], axis=-1)
        maps[:, 2, 2] = 1
        return maps


_CLASSES = Distortion(turn=0.3, shear=0.25, stretch=0.2, shift=0.0)
"""One draw for all images of a class: it becomes another character."""

_IMAGES = Distortion(turn=0.12, shear=0.1, stretch=0.1, shift=1.5)
"""One draw for each image: it is drawn by another hand."""


@dataclass(frozen=True, eq=False)
class DistortedSampler(TaskSampler):
    """Tasks whose classes, and whose single images, are distorted.

    Every image of a class undergoes the class's map and one of its own. Images are of ink and
    paper, and stay so: training would else see strokes that no test image has.
    """

    def draw(self, number: int) -> Tasks:
        """Task `number`; see `TaskSampler`."""
        task = super().draw(number)
        random = np.random.default_rng((self.seed, number, 1))
        classes = _CLASSES.draw(random, self.ways)

        def distorted(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
            return warp(images, classes[labels] @ _IMAGES.draw(random, len(images)))

        return task._replace(
            support=distorted(task.support, task.support_label),
            query=distorted(task.query, task.query_label),
        )


def warp(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Each image under its map, as ink and paper again.

    Args:
        images: float32 [n, H, W, C] of zeros and ones.
        maps: [n, 3, 3], from the centred coordinates of the result to those of the image.

    Returns:
        Like `images`; what comes from beyond the edge is paper.
    """
    centre = (np.array(images.shape[1:]) - 1) / 2
    warped = np.empty_like(images)
    for image, about_centre, result in zip(images, maps, warped, strict=True):
        across = np.eye(3)  # channels stay where they are
        across[:2, :2] = about_centre[:2, :2]
        offset = centre - across @ centre
        offset[:2] += about_centre[:2, 2]
        sampled = ndimage.affine_transform(image, across, offset, order=1, mode="grid-constant")
        result[...] = sampled > _INK
    return warped
