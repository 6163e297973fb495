"""Datasets from the user's folders of images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from air_core.datasets import Dataset, Examples, get_dataset
from tests.helpers.dataset_trees import draw


@pytest.fixture
def tree(tmp_path) -> Path:
    """Class folders without parts: 20 cats, 10 dogs, 10 sea lions."""
    home = tmp_path / "pets"
    for name, count, kind in (("dog", 10, "png"), ("cat", 20, "png"), ("sea_lion", 10, "PNG")):
        for i in range(count):
            draw(home / name / f"{i:02}.{kind}")
    return home


@pytest.fixture
def parted(tmp_path) -> Path:
    """train/ and test/ with 10 and 3 images of each class."""
    home = tmp_path / "parted"
    for part, count in (("train", 10), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                draw(home / part / name / f"{i}.jpg")
    return home


def dataset(home: Path) -> Dataset:
    return get_dataset(f"folder:{home}")


def load(home: Path) -> Examples:
    return dataset(home).load(None)


def paths(home: Path, part: str | None = None) -> list[str]:
    examples = load(home)
    return [
        str(file.relative_to(home))
        for file, of in zip(examples.images.files, examples.parts, strict=True)
        if part in (None, of)
    ]


# ---------------------------------------------------------------- parts


def test_a_tree_without_parts_keeps_a_tenth_of_each_class_for_validation(tree):
    examples = load(tree)
    assert dataset(tree).classnames == ("cat", "dog", "sea lion")
    assert dataset(tree).template == "a photo of a {}"
    assert Counter(examples.parts.tolist()) == {"free": 36, "val": 4}
    assert np.bincount(examples.labels[examples.parts == "val"]).tolist() == [2, 1, 1]
    assert paths(tree) == sorted(paths(tree))
    assert len(examples.images) == len(examples.labels) == 40


def test_part_folders_define_parts_and_without_val_a_tenth_of_train_is_for_validation(parted):
    counts = Counter(load(parted).parts.tolist())
    assert counts == {"train": 18, "val": 2, "test": 6}
    assert all(path.startswith("train/") for path in paths(parted, "val"))
    assert all(path.startswith("test/") for path in paths(parted, "test"))
    for name in ("cat", "dog"):
        draw(parted / "val" / name / "a.jpg")
    assert Counter(load(parted).parts.tolist()) == {"train": 20, "val": 2, "test": 6}
    assert paths(parted, "val") == ["val/cat/a.jpg", "val/dog/a.jpg"]


def test_a_class_can_have_the_name_of_a_part(tmp_path):
    for name in ("bus", "train"):
        for i in range(5):
            draw(tmp_path / name / f"{i}.jpg")
    assert dataset(tmp_path).classnames == ("bus", "train")
    assert set(load(tmp_path).parts.tolist()) == {"free", "val"}


def test_parts_do_not_depend_on_the_path_of_the_folder(tree, tmp_path):
    moved = tree.rename(tmp_path / "moved")
    before = paths(moved, "val")
    assert before == paths(moved.rename(tmp_path / "again"), "val")


# ---------------------------------------------------------------- names and template


def test_class_names_and_template_come_from_text_files_which_are_listed(tree):
    (tree / "classnames.txt").write_text("# ours\n\nsea_lion = eared seal\ncat=tabby cat\n")
    (tree / "template.txt").write_text("a sketch of a {}\n")
    named = dataset(tree)
    assert named.classnames == ("tabby cat", "dog", "eared seal")
    assert named.template == "a sketch of a {}"
    files = named.files(None)
    assert files == sorted(files)
    assert {tree / "classnames.txt", tree / "template.txt"} < set(files)
    assert len(files) == 42


def test_a_file_from_windows_is_read(tree):
    (tree / "classnames.txt").write_bytes("dog = hound\r\n".encode("utf-8-sig"))
    assert dataset(tree).classnames == ("cat", "hound", "sea lion")


def test_invisible_joiners_are_allowed_in_class_names(tree):
    (tree / "classnames.txt").write_text("cat = \u06af\u0631\u0628\u0647\u200c\u0647\u0627\n")
    assert "\u200c" in dataset(tree).classnames[0]


def test_the_name_of_the_dataset_is_its_absolute_path(tree, monkeypatch):
    """Workers have other working directories."""
    monkeypatch.chdir(tree.parent)
    assert get_dataset("folder:pets").name == f"folder:{tree}"
    assert get_dataset("folder:pets").about == "pets, 3 classes"


def test_folders_of_operating_systems_are_not_classes(tree):
    for name in ("__MACOSX", ".thumbnails"):
        draw(tree / name / "0.png")
    for name in ("Thumbs.db", "._00.png"):  # of Windows, and of archives made on macOS
        (tree / "cat" / name).write_bytes(b"no image")
    assert dataset(tree).classnames == ("cat", "dog", "sea lion")
    assert len(load(tree).images) == 40


def test_links_to_images_and_to_folders_are_followed(tree):
    (tree / "cat" / "link.png").symlink_to(tree / "dog" / "00.png")
    (tree / "fox").symlink_to(tree / "dog")
    assert np.bincount(load(tree).labels).tolist() == [21, 10, 10, 10]
