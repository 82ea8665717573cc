"""Omniglot from generated zips and folders; tasks; Lake's runs; every mistake in one sentence."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from experiments.common.data.omniglot import load_omniglot, load_one_shot_runs
from experiments.common.data.tasks import Characters, TaskSampler
from experiments.common.errors import UserError


def png(ink: np.ndarray) -> bytes:
    """A 1-bit picture in which ink is black, as published."""
    content = io.BytesIO()
    Image.fromarray(ink == 0).save(content, "png")
    return content.getvalue()


def drawings(seed: int, alphabets: dict[str, int], size: int, count: int = 4) -> dict[str, bytes]:
    """Path below the archive's folder to png, `count` random drawings a character."""
    random = np.random.default_rng(seed)
    return {
        f"{alphabet}/character{character:02}/{character:04}_{number:02}.png": png(
            random.integers(0, 2, (size, size), np.uint8)
        )
        for alphabet, characters in alphabets.items()
        for character in range(1, characters + 1)
        for number in range(1, count + 1)
    }


def write_zip(root, name, files):
    (root / "omniglot").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "omniglot" / f"{name}.zip", "w") as archive:
        for path, content in files.items():
            archive.writestr(f"{name}/{path}", content)


def write_folder(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def test_the_resized_zip_is_split_by_the_published_alphabets(tmp_path):
    files = drawings(0, {"Greek": 2, "Latin": 1, "Angelic": 3}, 28)
    write_zip(tmp_path, "omniglot_resized", files)
    data = load_omniglot(tmp_path)
    assert data.train.names == ("Greek/character01", "Greek/character02", "Latin/character01")
    assert len(data.test) == 3
    assert data.test.shape == (28, 28, 1)
    with Image.open(io.BytesIO(files["Angelic/character02/0002_03.png"])) as image:
        expected = ~np.asarray(image)
    np.testing.assert_array_equal(data.test.images[1][2, ..., 0], expected)


def test_the_public_zips_overlap_and_are_resized_to_the_nearest_pixel(tmp_path):
    greek = drawings(0, {"Greek": 1}, 105)
    write_zip(tmp_path, "images_background_small1", greek | drawings(1, {"Korean": 2}, 105))
    write_zip(tmp_path, "images_background_small2", greek | drawings(2, {"Tagalog": 1}, 105))
    write_zip(tmp_path, "images_evaluation", drawings(3, {"Unheard_of": 2}, 105))
    data = load_omniglot(tmp_path)
    assert [name.split("/")[0] for name in data.train.names] == [
        "Greek",
        *["Korean"] * 2,
        "Tagalog",
    ]
    assert [len(images) for images in data.train.images] == [4] * 4
    assert data.test.names == ("Unheard_of/character01", "Unheard_of/character02")
    with Image.open(io.BytesIO(greek["Greek/character01/0001_01.png"])) as image:
        expected = np.asarray(image.convert("L").resize((28, 28), Image.Resampling.NEAREST)) < 128
    np.testing.assert_array_equal(data.train.images[0][0, ..., 0], expected)
    assert load_omniglot(tmp_path, size=None).test.shape == (105, 105, 1)


def test_where_both_are_there_the_resized_zip_is_read_unless_asked(tmp_path):
    write_zip(tmp_path, "omniglot_resized", drawings(0, {"Greek": 1, "Angelic": 1}, 28))
    write_zip(tmp_path, "images_evaluation", drawings(1, {"Angelic": 2}, 105))
    assert len(load_omniglot(tmp_path).test) == 1
    assert len(load_omniglot(tmp_path, source="public").test) == 2
    (tmp_path / "omniglot" / "omniglot_resized.zip").unlink()
    with pytest.raises(UserError, match=r"omniglot_resized\.zip was not found"):
        load_omniglot(tmp_path, source="resized")


@pytest.mark.parametrize("archive", [True, False])
def test_any_folder_or_zip_of_characters_is_tested_on(tmp_path, archive):
    files = drawings(0, {"Klingon": 2, "Elvish": 1}, 105)
    if archive:
        write_zip(tmp_path, "mine", files)
        root = tmp_path / "omniglot" / "mine.zip"
    else:
        root = tmp_path / "mine"
        write_folder(root, files)
    data = load_omniglot(root)
    assert len(data.test) == 3
    assert len(data.train) == 0


def test_damage_and_overlap_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"omniglot/images_background\.zip was not found"):
        load_omniglot(tmp_path)
    files = drawings(0, {"Greek": 1, "Angelic": 1}, 28)
    write_zip(tmp_path, "images_background", files)
    write_zip(tmp_path, "images_evaluation", files)
    with pytest.raises(UserError, match="the alphabet Angelic is in both splits"):
        load_omniglot(tmp_path)
    write_zip(tmp_path, "images_background", drawings(0, {"Greek": 1}, 30) | {
        path: content for path, content in files.items() if "0001_04" in path and "Greek" in path
    })  # fmt: skip
    write_zip(tmp_path, "images_evaluation", drawings(0, {"Angelic": 1}, 30))
    with pytest.raises(UserError, match="is 28x28 where the others are 30x30"):
        load_omniglot(tmp_path)
    (tmp_path / "omniglot" / "images_evaluation.zip").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="is truncated or no zip archive"):
        load_omniglot(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "noise", "flip", "empty"])
def test_a_damaged_picture_is_named(tmp_path, damage):
    files = drawings(0, {"Angelic": 1}, 28)
    path = "Angelic/character01/0001_02.png"
    whole = files[path]
    files[path] = {
        "cut": whole[: len(whole) // 2],
        "noise": bytes(range(100)),
        "flip": whole[:50] + bytes([whole[50] ^ 255]) + whole[51:],
        "empty": b"",
    }[damage]
    write_folder(tmp_path, files)
    with pytest.raises(UserError, match=r"0001_02\.png cannot be used: it is unreadable"):
        load_omniglot(tmp_path)


def characters(count, images):
    pixels = np.arange(count * images, dtype=np.float32).reshape(count, images, 1, 1, 1)
    return Characters(tuple(f"c{i}" for i in range(count)), tuple(pixels))


def test_tasks_are_drawn_from_the_seed_and_share_no_image():
    sampler = TaskSampler(characters(7, 6), ways=3, shots=2, queries=4, seed=5)
    task = sampler.draw(11)
    assert task.support.shape == (6, 1, 1, 1)
    assert task.query.shape == (12, 1, 1, 1)
    drawn = np.concatenate([task.support, task.query]).reshape(-1)
    assert len(set(drawn)) == 18
    classes = task.support.reshape(-1) // 6
    np.testing.assert_array_equal(classes, classes[::2].repeat(2))
    np.testing.assert_array_equal(task.query.reshape(-1) // 6, classes[::2].repeat(4))
    np.testing.assert_array_equal(task.support_label, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(sampler.draw(11).query, task.query)
    other = TaskSampler(sampler.characters, ways=3, shots=2, queries=4, seed=6).draw(11)
    assert not np.array_equal(other.query, task.query)


def test_batches_go_on_from_a_saved_position():
    sampler = TaskSampler(characters(5, 4), ways=2, shots=1, queries=1, seed=0)
    batches = sampler.batches(3)
    next(batches)
    state = batches.get_state()
    second = next(batches)
    again = sampler.batches(3)
    again.set_state(state)
    np.testing.assert_array_equal(next(again).support, second.support)
    np.testing.assert_array_equal(sampler.first(3, start=3).support, second.support)


def test_a_rotation_is_a_class_of_its_own():
    square = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    turned = Characters(("a",), (square,)).rotated()
    assert turned.names[1] == "a, turned by 90"
    np.testing.assert_array_equal(turned.images[1][0, ..., 0], [[1, 3], [0, 2]])
    np.testing.assert_array_equal(turned.images[2][0, ..., 0], [[3, 2], [1, 0]])


def test_impossible_tasks_are_refused():
    few = characters(4, 5)
    with pytest.raises(UserError, match="5-way tasks need 5 characters and there are 4"):
        TaskSampler(few, ways=5, shots=1, queries=1, seed=0)
    with pytest.raises(UserError, match="character c0 has 5 images, and tasks of 2 shots and 4"):
        TaskSampler(few, ways=2, shots=2, queries=4, seed=0)
    with pytest.raises(UserError, match="give at least 1 of each"):
        TaskSampler(few, ways=2, shots=0, queries=4, seed=0)


def test_lakes_runs_are_read_in_order(tmp_path):
    ink = np.eye(28, dtype=np.uint8)
    files = {}
    for run in ("run02", "run01"):
        for name in ("training/class01", "training/class02", "test/item01", "test/item02"):
            files[f"{run}/{name}.png"] = png(ink if name[-1] == "1" else 1 - ink)
        pairs = (("item01", "class02"), ("item02", "class01"))
        lines = [f"{run}/test/{item}.png {run}/training/{cls}.png" for item, cls in pairs]
        files[f"{run}/class_labels.txt"] = "\n".join(lines).encode()
    write_zip(tmp_path, "all_runs", files)
    runs = load_one_shot_runs(tmp_path)
    assert len(runs) == 2
    assert runs[0].support.shape == (1, 2, 28, 28, 1)
    np.testing.assert_array_equal(runs[0].support[0, 0, ..., 0], ink)
    np.testing.assert_array_equal(runs[0].query_label, [[1, 0]])
    del files["run01/test/item02.png"]
    write_zip(tmp_path, "all_runs", files)
    with pytest.raises(UserError, match=r"names run01/test/item02\.png, which is not there"):
        load_one_shot_runs(tmp_path)
