"""Small data sets in the publishers' formats, for the loaders' tests."""

from __future__ import annotations

import gzip
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def random_images(seed: int, count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(root: Path, train: np.ndarray, test: np.ndarray) -> None:
    folder = root / "mnist"
    folder.mkdir(parents=True)
    for part, images in (("train", train), ("t10k", test)):
        labels = (np.arange(len(images)) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))


def write_cifar10(root: Path, batches: dict[str, np.ndarray]) -> None:
    folder = root / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, images in batches.items():
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {"data": planes, "labels": list(range(len(images))), "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_faces(root: Path, faces: dict[int, np.ndarray], archive: bool) -> None:
    folder = root / "orl_faces"
    folder.mkdir(parents=True)
    for person, images in faces.items():
        person_folder = folder / "att_faces" / f"s{person}"
        person_folder.mkdir(parents=True)
        for number, image in enumerate(images, 1):
            Image.fromarray(image).save(person_folder / f"{number}.pgm")
    if archive:
        with zipfile.ZipFile(folder / "att_faces.zip", "w") as zipped:
            for path in sorted((folder / "att_faces").rglob("*.pgm")):
                zipped.write(path, path.relative_to(folder))
                path.unlink()


def write_celeba(root: Path, images: np.ndarray) -> Path:
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for number, image in enumerate(images, 1):
        Image.fromarray(image).save(folder / f"{number:06d}.jpg", quality=95)
    return folder
