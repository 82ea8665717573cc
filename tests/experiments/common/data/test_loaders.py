"""Every loader on generated files in its publishers' format, intact and damaged."""

from __future__ import annotations

import gzip
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from experiments.common.data import data_root, load_images
from experiments.common.errors import UserError
from tests.experiments.common.data import writers

TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))


def read_all(split):
    return split.images.read(np.arange(len(split)))


def test_digits_are_split_by_digit_and_never_shared():
    data = load_images("digits")
    train, test = read_all(data.train), read_all(data.test)
    assert train.shape == (1437, 8, 8, 1)
    assert test.shape == (360, 8, 8, 1)
    assert train.dtype == np.float32
    assert train.min() == 0
    assert train.max() == 1
    shares = np.bincount(data.test.labels) / np.bincount(data.train.labels)
    np.testing.assert_allclose(shares, 0.25, atol=0.02)
    again = load_images("digits")
    np.testing.assert_array_equal(read_all(again.test), test)


def test_mnist_takes_the_sizes_from_the_files(tmp_path):
    train, test = writers.random_images(0, 7, 28, 28), writers.random_images(1, 3, 28, 28)
    writers.write_mnist(tmp_path, train, test)
    data = load_images("mnist", tmp_path)
    assert data.shape == (28, 28, 1)
    # Pixels are float32, the right-hand sides float64.
    np.testing.assert_allclose(read_all(data.train)[..., 0], train / 255, rtol=1e-6)
    np.testing.assert_allclose(read_all(data.test)[..., 0], test / 255, rtol=1e-6)
    np.testing.assert_array_equal(data.train.labels, np.arange(7))


def test_mnist_reads_unpacked_files(tmp_path):
    writers.write_mnist(
        tmp_path, writers.random_images(0, 4, 28, 28), writers.random_images(1, 2, 28, 28)
    )
    for path in (tmp_path / "mnist").glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(load_images("mnist", tmp_path).train) == 4


def test_mnist_is_resized_on_request(tmp_path):
    writers.write_mnist(
        tmp_path, np.full((4, 28, 28), 51, np.uint8), writers.random_images(1, 2, 28, 28)
    )
    data = load_images("mnist", tmp_path, size=(14, 10))
    assert data.shape == (14, 10, 1)
    np.testing.assert_allclose(read_all(data.train), 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[: len(content) // 2], "truncated"),
        (lambda content: b"no gzip at all", "truncated or not readable"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-5]), "announces 3136"),
        (lambda content: gzip.compress(gzip.decompress(content) + b"x"), "announces 3136"),
        (lambda content: gzip.compress(b"\1\2\3\4" * 9), "not an idx file"),
        (lambda content: gzip.compress(b""), "not an idx file"),
        (
            lambda content: gzip.compress(writers.idx_bytes(np.zeros((4, 784), np.uint8))),
            "2 axes where 3",
        ),
    ],
)
def test_a_damaged_idx_file_is_named_with_what_is_wrong(tmp_path, damage, words):
    writers.write_mnist(
        tmp_path, writers.random_images(0, 4, 28, 28), writers.random_images(1, 2, 28, 28)
    )
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=words) as caught:
        load_images("mnist", tmp_path)
    assert str(path) in str(caught.value)
    assert "download mnist" in str(caught.value)


def test_mnist_refuses_test_images_of_another_size(tmp_path):
    train, test = writers.random_images(0, 4, 28, 28), writers.random_images(1, 2, 20, 28)
    writers.write_mnist(tmp_path, train, test)
    with pytest.raises(UserError, match=r"t10k-images.* of 20x28 where those of the"):
        load_images("mnist", tmp_path)
    assert load_images("mnist", tmp_path, size=(14, 14)).shape == (14, 14, 1)


def test_labels_of_another_number_are_refused(tmp_path):
    writers.write_mnist(
        tmp_path, writers.random_images(0, 4, 28, 28), writers.random_images(1, 2, 28, 28)
    )
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(writers.idx_bytes(np.zeros(3, np.uint8))))
    with pytest.raises(UserError, match="3 labels for 4 images"):
        load_images("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "mnist/train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar10/cifar-10-batches-py/data_batch_1"),
        ("faces", "orl_faces/att_faces.zip"),
        ("celeba", "celeba/img_align_celeba"),
    ],
)
def test_missing_data_says_which_file_where_and_what_to_do(tmp_path, name, file):
    with pytest.raises(UserError) as caught:
        load_images(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(file)
    assert str(tmp_path) in message
    assert f"python -m experiments.common.data download {name}" in message


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"imagenet.*digits, mnist"):
        load_images("imagenet")


def test_the_data_root_is_the_option_else_the_environment_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JDEQ_DATA", str(tmp_path / "environment"))
    assert data_root(tmp_path / "option") == tmp_path / "option"
    assert data_root() == tmp_path / "environment"
    monkeypatch.delenv("JDEQ_DATA")
    assert data_root().name == "jdeq"


def test_cifar10_has_channels_last_and_the_published_batches(tmp_path):
    batches = {
        name: writers.random_images(number, number + 2, 32, 32, 3)
        for number, name in enumerate((*TRAIN, "test_batch"))
    }
    writers.write_cifar10(tmp_path, batches)
    data = load_images("cifar10", tmp_path)
    assert data.shape == (32, 32, 3)
    expected = np.concatenate([batches[name] for name in TRAIN]) / 255
    np.testing.assert_allclose(read_all(data.train), expected, rtol=1e-6)
    np.testing.assert_allclose(read_all(data.test), batches["test_batch"] / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]})[:80], "truncated"),
        (pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [1, 2]}), "shape"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}), "float32"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), "1 labels for 2"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, -1]}), "no numbers"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 1.7]}), "no numbers"),
        (pickle.dumps({"labels": [1]}), "lacks the entries"),
        (pickle.dumps([1, 2]), "lacks the entries"),
    ],
)
def test_a_damaged_cifar10_batch_is_named_with_what_is_wrong(tmp_path, content, words):
    images = writers.random_images(0, 2, 32, 32, 3)
    writers.write_cifar10(tmp_path, dict.fromkeys((*TRAIN, "test_batch"), images))
    path = tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_images("cifar10", tmp_path)
    assert str(path) in str(caught.value)


def test_a_cifar10_pickle_cannot_run_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    images = writers.random_images(0, 2, 32, 32, 3)
    writers.write_cifar10(tmp_path, dict.fromkeys((*TRAIN, "test_batch"), images))
    path = tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="open"):
        load_images("cifar10", tmp_path)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("archive", [True, False])
def test_faces_are_split_by_person(tmp_path, archive):
    faces = {person: writers.random_images(person, 3, 112, 92) for person in (3, 4, 7, 20, 40)}
    writers.write_faces(tmp_path, faces, archive)
    data = load_images("faces", tmp_path)
    assert data.shape == (112, 92, 1)
    assert set(data.train.labels) | set(data.test.labels) == set(faces)
    assert not set(data.train.labels) & set(data.test.labels)
    assert len(data.test) == 3
    for split in (data.train, data.test):
        for image, person in zip(read_all(split), split.labels, strict=True):
            known = faces[int(person)] / np.float32(255)
            assert np.isclose(known, image[..., 0]).all(axis=(1, 2)).any()
    assert load_images("faces", tmp_path, size=(48, 40)).shape == (48, 40, 1)


def test_damaged_faces_are_named(tmp_path):
    faces = {person: writers.random_images(person, 2, 112, 92) for person in (1, 2)}
    writers.write_faces(tmp_path, faces, archive=False)
    path = tmp_path / "orl_faces" / "att_faces" / "s2" / "1.pgm"
    intact = path.read_bytes()
    path.write_bytes(intact[:500])
    with pytest.raises(UserError, match=r"s2/1\.pgm.*unreadable"):
        load_images("faces", tmp_path)
    Image.fromarray(writers.random_images(0, 1, 50, 40)[0]).save(path)
    with pytest.raises(UserError, match="is 50x40 where the others are 112x92"):
        load_images("faces", tmp_path)


def test_a_truncated_archive_of_faces_is_named(tmp_path):
    faces = {person: writers.random_images(person, 2, 112, 92) for person in (1, 2)}
    writers.write_faces(tmp_path, faces, archive=True)
    path = tmp_path / "orl_faces" / "att_faces.zip"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="truncated or no zip archive"):
        load_images("faces", tmp_path)


def smooth_images(count, height=218, width=178):
    """Images that survive jpg: a gradient of another colour in each."""
    ramp = np.linspace(0, 150, height)[:, None, None] + np.zeros((height, width, 3))
    return np.stack([ramp + 10 * number for number in range(count)]).astype(np.uint8)


def test_celeba_is_cropped_resized_and_read_when_asked(tmp_path):
    images = smooth_images(10)
    writers.write_celeba(tmp_path, images)
    data = load_images("celeba", tmp_path)
    assert data.shape == (64, 64, 3)
    assert (len(data.train), len(data.test)) == (9, 1)
    assert not data.train.images.in_memory
    read = data.train.images.read(np.array([4, 0]))
    assert read.shape == (2, 64, 64, 3)
    assert read.dtype == np.float32
    crop = images[4, 35 : 35 + 148, 15 : 15 + 148] / 255
    assert abs(read[0].mean() - crop.mean()) < 0.01
    # The crop's rows: the first row of the result is near row 35 of the image, the last near 183.
    assert abs(read[0, 0].mean() - crop[0].mean()) < 0.02
    assert abs(read[0, -1].mean() - crop[-1].mean()) < 0.02
    assert data.train.images.read(np.array([], int)).shape == (0, 64, 64, 3)


def test_celeba_that_vanishes_is_an_error_and_not_replaced_by_other_images(tmp_path):
    folder = writers.write_celeba(tmp_path, smooth_images(6))
    images = load_images("celeba", tmp_path).train.images
    next(folder.glob("*3.jpg")).unlink()
    with pytest.raises(UserError, match=r"000003\.jpg cannot be used.*No such file"):
        images.read(np.arange(len(images)))


def test_celeba_reads_the_published_archive_and_partition(tmp_path):
    folder = writers.write_celeba(tmp_path, smooth_images(6))
    with zipfile.ZipFile(tmp_path / "celeba" / "img_align_celeba.zip", "w") as archive:
        for path in sorted(folder.glob("*.jpg")):
            archive.write(path, f"img_align_celeba/{path.name}")
            path.unlink()
    partition = "".join(f"{number:06d}.jpg {2 if number < 3 else 0}\n" for number in range(1, 7))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text(partition)
    data = load_images("celeba", tmp_path)
    assert (len(data.train), len(data.test)) == (4, 2)
    assert data.test.images.names == (
        "img_align_celeba/000001.jpg",
        "img_align_celeba/000002.jpg",
    )
    assert data.train.images.read(np.arange(4)).shape == (4, 64, 64, 3)


def test_a_partition_that_is_no_text_is_refused(tmp_path):
    writers.write_celeba(tmp_path, writers.random_images(0, 3, 160, 150, 3))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(UserError, match="puts 0 of the 3 jpgs into the test split"):
        load_images("celeba", tmp_path)


def test_damaged_jpgs_are_counted_and_skipped(tmp_path, capsys):
    folder = writers.write_celeba(tmp_path, smooth_images(8))
    content = (folder / "000002.jpg").read_bytes()
    (folder / "000002.jpg").write_bytes(content[: len(content) // 2])
    (folder / "000005.jpg").write_bytes(b"")
    (folder / "000006.jpg").write_bytes(b"not a jpg")
    data = load_images("celeba", tmp_path)
    assert len(data.train) + len(data.test) == 5
    message = capsys.readouterr().err
    assert "3 of 8 jpgs" in message
    assert "000002.jpg" in message


def test_a_jpg_that_fails_later_is_replaced_by_the_next(tmp_path, capsys):
    folder = writers.write_celeba(tmp_path, smooth_images(5))
    data = load_images("celeba", tmp_path)
    (folder / "000002.jpg").write_bytes(b"gone bad")
    read = data.train.images.read(np.array([1, 2]))
    np.testing.assert_array_equal(read[0], read[1])
    assert "000002.jpg cannot be decoded" in capsys.readouterr().err


def test_jpgs_of_mixed_or_small_size_are_refused(tmp_path):
    folder = writers.write_celeba(tmp_path / "mixed", smooth_images(3))
    Image.fromarray(smooth_images(1, 200, 178)[0]).save(folder / "000002.jpg")
    with pytest.raises(UserError, match=r"differ in size.*178x218.*178x200"):
        load_images("celeba", tmp_path / "mixed")
    writers.write_celeba(tmp_path / "small", smooth_images(3, 100, 100))
    with pytest.raises(UserError, match="at least 148x148"):
        load_images("celeba", tmp_path / "small")


def test_too_few_jpgs_are_refused(tmp_path):
    writers.write_celeba(tmp_path, smooth_images(1))
    with pytest.raises(UserError, match="at least two"):
        load_images("celeba", tmp_path)
