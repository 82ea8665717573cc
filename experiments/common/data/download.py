"""Fetching the public data sets: checksummed, and resumed where a transfer broke off."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests
from pooch.processors import ExtractorProcessor

from experiments.common.data.location import data_root
from experiments.common.errors import UserError
from experiments.common.terminal import say

_CHUNK = 1 << 16
_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class Source:
    """A data set as its publishers offer it.

    Attributes:
        folder: Folder below the data root.
        files: File name to (URL, checksum).
        unpack: Whether the files are tar archives to be unpacked beside themselves.
    """

    folder: str
    files: dict[str, tuple[str, str]]
    unpack: bool = False


_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}

SOURCES = {
    "mnist": Source(
        "mnist", {name: (_MNIST_URL + name, f"md5:{md5}") for name, md5 in _MNIST_MD5.items()}
    ),
    "cifar10": Source(
        "cifar10",
        {
            "cifar-10-python.tar.gz": (
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "md5:c58f30108f718f92721af3b95e74349a",
            )
        },
        unpack=True,
    ),
    "omniglot": Source(
        "omniglot",
        {
            "images_background.zip": (
                _OMNIGLOT_URL + "images_background.zip",
                "md5:68d2efa1b9178cc56df9314c21c6e718",
            ),
            "images_evaluation.zip": (
                _OMNIGLOT_URL + "images_evaluation.zip",
                "md5:6b91aef0f799c5bb55b94e3f2daec811",
            ),
        },
    ),
    "faces": Source(
        "orl_faces",
        {
            "att_faces.zip": (
                "https://www.idiap.ch/software/bob/data/bob/att_faces.zip",
                "md5:6efb25cb0d40755e9492b9c012e3348d",
            )
        },
    ),
}


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch what is missing of a data set; what is there and intact is left alone.

    Args:
        name: `mnist`, `cifar10`, `omniglot` or `faces`.
        root: The data root; None for `JDEQ_DATA` or the user's cache.

    Returns:
        The folder of the data set.

    Raises:
        UserError: The name is unknown or must be fetched by hand, the network is not reachable,
            a checksum does not agree, or the folder cannot be written.
    """
    if name == "celeba":
        raise UserError(
            "CelebA's licence wants you to fetch it yourself: get img_align_celeba.zip and "
            "list_eval_partition.txt from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and "
            f"put both into {data_root(root) / 'celeba'}."
        )
    if name not in SOURCES:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(SOURCES)}.")
    source = SOURCES[name]
    folder = data_root(root) / source.folder
    for file, (url, checksum) in source.files.items():
        _fetch(folder, file, url, checksum, source.unpack)
    return folder


def _fetch(folder: Path, file: str, url: str, checksum: str, unpack: bool) -> None:
    pooch.get_logger().setLevel("WARNING")  # the downloader says what is fetched
    processor: ExtractorProcessor | None = pooch.Untar(extract_dir=".") if unpack else None
    try:
        pooch.retrieve(
            url,
            known_hash=checksum,
            fname=file,
            path=folder,
            downloader=ResumingDownloader(folder / f"{file}.part"),
            processor=processor,
        )
    except requests.exceptions.RequestException as error:
        raise UserError(
            f"{url} could not be fetched ({type(error).__name__}); check the network and run the "
            f"command again (it continues where it stopped), or put the file into {folder}."
        ) from error
    except ValueError as error:
        raise UserError(
            f"what {url} sent does not have the published checksum {checksum} and was discarded; "
            f"try again later, or put the right file into {folder}."
        ) from error
    except OSError as error:
        raise UserError(
            f"{folder / file} cannot be written ({error.strerror or error}); choose another "
            "folder with --data-root or JDEQ_DATA."
        ) from error


class ResumingDownloader:
    """A downloader for pooch that keeps what arrived and asks only for the rest next time.

    Args:
        partial: Where the bytes are kept until the file is whole.
    """

    def __init__(self, partial: Path):
        self.partial = partial

    def __call__(self, url: str, output_file: str | os.PathLike[str], pooch: object) -> None:
        """Fetch `url` into `output_file`; called by pooch, which then compares the checksum."""
        del pooch
        have = self.partial.stat().st_size if self.partial.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
                answer.close()  # everything is there already, or the file on the server changed
            else:
                answer.raise_for_status()
                continues = answer.status_code == requests.codes.partial_content
                self._receive(url, answer, have if continues else 0)
        # Whatever the checksum says, the next attempt must not build on these bytes.
        shutil.move(self.partial, output_file)

    def _receive(self, url: str, answer: requests.Response, have: int) -> None:
        total = int(answer.headers.get("Content-Length", 0)) + have
        size = f" ({total / 1e6:.1f} MB)" if total > have else ""
        say(f"fetching {url}{size}" + (f", continuing at {have / 1e6:.1f} MB" if have else ""))
        with self.partial.open("ab" if have else "wb") as file:
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
        # A server that hangs up early is not always reported as an error.
        received = self.partial.stat().st_size
        if total > have and received < total:
            raise requests.exceptions.ConnectionError(f"{received} of {total} bytes arrived")
