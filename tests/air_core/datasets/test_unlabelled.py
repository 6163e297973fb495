"""Datasets of images without class folders: `classes.txt`, and `labels.csv` for some images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from air_core.datasets import get_dataset
from air_core.paradigms import make_split
from air_core.settings import SplitSettings
from orchestrator.planning.resolve import Resolver
from orchestrator.planning.trial_checks import InvalidSetting
from tests.helpers.dataset_trees import draw


@pytest.fixture
def photos(tmp_path) -> Path:
    """12 images in folders that mean nothing, and two classes."""
    home = tmp_path / "photos"
    for i in range(6):
        draw(home / ("2/5.png" if i == 5 else f"{i}.png"))
        draw(home / "train" / "2021 trip" / f"{i}.jpg")
    draw(home / ".hidden" / "a.png")
    (home / "notes.mov").write_text("x")
    (home / "classes.txt").write_text("# animals\n\ncat\nsea_lion = a sea lion\n")
    return home


def parts(home: Path) -> dict[str, tuple[str, int]]:
    """Part and label by path."""
    examples = get_dataset(f"folder:{home}").load(None)
    paths = [file.relative_to(home).as_posix() for file in examples.images.files]
    assert paths == sorted(paths, key=lambda path: path.split("/"))
    return dict(
        zip(paths, zip(examples.parts.tolist(), examples.labels.tolist(), strict=True), strict=True)
    )


def test_without_labels_every_image_is_in_the_pool(photos):
    dataset = get_dataset(f"folder:{photos}")
    assert dataset.classnames == ("cat", "a sea lion")
    assert set(parts(photos).values()) == {("train", -1)}
    assert len(parts(photos)) == 12
    assert dataset.skipped() == {".mov": 1}
    examples = dataset.load(None)
    split = make_split(examples.labels, examples.parts, SplitSettings())
    assert split.pool.tolist() == list(range(12))
    assert not len(split.test) + len(split.validation) + len(split.labelled)


def test_labelled_images_are_for_test_or_validation_and_never_in_the_pool(photos):
    before = Resolver(photos.parent / "c.json", None).dataset_by_name(f"folder:{photos}")
    (photos / "labels.csv").write_text(
        "part,image,class\n"
        ",0.png,cat\n"
        "val,train/2021 trip/3.jpg,sea_lion\n\n"
        ",2.png,\n,1.png,\n"  # nobody has labelled them yet
        "part,image,class\n"  # a second sample
        'test,"./1.png","A sea lion"\n',
        encoding="utf-8-sig",
    )
    found = parts(photos)
    labelled = {path: of for path, of in found.items() if of != ("train", -1)}
    assert labelled == {
        "0.png": ("test", 0),
        "1.png": ("test", 1),
        "train/2021 trip/3.jpg": ("val", 1),
    }
    examples = get_dataset(f"folder:{photos}").load(None)
    for pool in ("train", "train+val"):
        split = make_split(examples.labels, examples.parts, SplitSettings(pool=pool))
        assert (len(split.pool), len(split.test), len(split.validation)) == (9, 2, 1)
        assert set(examples.labels[split.pool].tolist()) == {-1}
    # The labels are part of the dataset's content.
    after = Resolver(photos.parent / "c.json", None).dataset_by_name(f"folder:{photos}")
    assert before.ref.digest != after.ref.digest
    assert (before.ref.labelled, after.ref.labelled) == (0, 3)
    lines = "image,class,part\r\n0.png,CAT,\r\n1.png,a sea lion,\r\n"  # the same, by a spreadsheet
    (photos / "labels.csv").write_text(f"{lines}train/2021 trip/3.jpg,a sea lion,val\r\n")
    again = Resolver(photos.parent / "c.json", None).dataset_by_name(f"folder:{photos}")
    assert after.ref == again.ref


NEEDS_LABELS = {
    "paradigm: ssl": {"paradigm": "ssl"},
    "pool_ratio": {"pool_ratio": 5.0},
    "images_from: true_labels": {"images_from": "true_labels", "images_per_class": 2},
    "initial_labels.true_share": {"initial_labels.true_share": 0.8},
}


@pytest.fixture
def resolver(photos) -> Resolver:
    return Resolver(photos.parent / "c.json", None)


@pytest.fixture
def flat(photos) -> dict[str, Any]:
    return {"dataset": f"folder:{photos}", "backbone": "tiny", "generator": "tiny"}


@pytest.mark.parametrize("words", NEEDS_LABELS)
def test_a_setting_that_needs_labels_of_the_pool_is_refused_before_a_run(resolver, flat, words):
    with pytest.raises(InvalidSetting, match=words) as caught:
        resolver.trial(flat | NEEDS_LABELS[words])
    assert caught.value.key == "dataset"


def test_validation_and_test_images_that_do_not_exist_are_refused_before_a_run(resolver, flat):
    assert resolver.trial(flat).dataset.digest
    with pytest.raises(InvalidSetting, match="has no validation images for the objective"):
        resolver.check_validation(flat["dataset"])
    with pytest.raises(InvalidSetting, match=r"has no test images; label some in its labels\.csv"):
        resolver.trial(flat | {"dataset": "digits", "test_dataset": flat["dataset"]})
