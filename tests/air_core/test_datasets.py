"""Datasets by contract: every one in the table is held to the same rules."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from air_core.datasets import DATASETS, Examples, get_dataset

ROOT = Path(os.environ["AIRSWEEP_DATA"]) if "AIRSWEEP_DATA" in os.environ else None


@cache
def load(name: str) -> Examples:
    dataset = get_dataset(name)
    if not all(file.is_file() for file in dataset.files(ROOT)):
        pytest.skip(f"{name} is not here; AIRSWEEP_DATA names the folder of real datasets")
    return dataset.load(ROOT)


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_says_what_it_is(name):
    dataset = DATASETS[name]
    assert dataset.name == name
    assert len(set(dataset.classnames)) == len(dataset.classnames) > 1
    assert dataset.template.count("{}") == 1
    assert dataset.template.format(dataset.classnames[0]) != dataset.template
    assert dataset.recipe >= 1
    assert dataset.source
    assert dataset.licence


@pytest.mark.parametrize("name", DATASETS)
def test_every_image_has_a_class_and_a_part(name):
    examples = load(name)
    assert len(examples.images) == len(examples.labels) == len(examples.parts)
    assert set(examples.parts.tolist()) <= {"train", "val", "test", "free"}
    assert examples.labels.dtype == np.int64
    classes = np.arange(len(DATASETS[name].classnames))
    assert np.array_equal(np.unique(examples.labels), classes)  # no class without an image


@pytest.mark.parametrize("name", DATASETS)
def test_there_is_something_to_learn_from_and_something_to_test_on(name):
    parts = set(load(name).parts.tolist())
    assert "free" in parts or {"train", "test"} <= parts
    assert not {"free", "test"} <= parts  # else the seed would move a fixed test part


@pytest.mark.parametrize("name", DATASETS)
def test_loading_again_gives_the_same_images_in_the_same_order(name):
    first, again = load(name), DATASETS[name].load(ROOT)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.parts, again.parts)
    for i in range(0, len(first.labels), max(1, len(first.labels) // 50)):
        assert first.images[i].tobytes() == again.images[i].tobytes()
        assert first.images[i].mode == "RGB"


@pytest.mark.parametrize("name", DATASETS)
def test_files_are_named_in_a_fixed_order(name):
    files = DATASETS[name].files(ROOT)
    assert files == sorted(files)
    assert files


def test_digits_are_1797_real_images_of_ten_classes():
    examples = load("digits")
    assert len(examples.images) == 1797
    assert len(np.unique(examples.labels)) == 10
    assert examples.images[0].size == (32, 32)


def test_digits_are_labelled_with_the_digit_that_they_show():
    """The mean image of a class is nearer to its own images than to those of another."""
    examples = load("digits")
    pixels = np.stack([np.asarray(image, dtype=float).mean(axis=2) for image in examples.images])
    means = np.stack([pixels[examples.labels == c].mean(axis=0) for c in range(10)])
    distance = ((pixels[:, None] - means[None]) ** 2).sum(axis=(2, 3))  # (N, C)
    assert (distance.argmin(axis=1) == examples.labels).mean() > 0.85
    assert DATASETS["digits"].classnames[7] == "digit seven"


def test_a_tenth_of_the_digits_is_for_validation_and_stratified():
    examples = load("digits")
    validation = examples.parts == "val"
    assert validation.sum() == 180
    shares = np.bincount(examples.labels[validation]) / np.bincount(examples.labels)
    assert shares.min() > 0.09
    assert shares.max() < 0.11


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown dataset 'digitz'; known: .*digits"):
        get_dataset("digitz")


LISTING = """
import sys
from air_core.datasets import DATASETS
assert DATASETS["digits"].files(None)[0].is_file()
print(*sorted({"numpy", "PIL", "sklearn", "torch"} & set(sys.modules)))
"""


def test_knowing_what_datasets_there_are_opens_none():
    done = subprocess.run(
        [sys.executable, "-c", LISTING],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == []
