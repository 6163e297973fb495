"""Datasets of images without class folders: `classes.txt`, and `labels.csv` for some images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from air_core.datasets import get_dataset
from air_core.paradigms import make_split
from air_core.settings import SplitSettings
from orchestrator.cluster.input_checks import check_dataset
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


BAD_LABELS = {
    "image,class\n0,cat\n": r"labels\.csv:2: '0' is not an image in .*'0\.png'",
    "image,class\n0.png,cow\n": r"labels\.csv:2: 'cow' is not a class; .*'cat', 'sea_lion'",
    "image,class\n0.png,sealion\n": r"labels\.csv:2: .* did you mean 'sea_lion'",
    "image,class\n\n0.png,cat\n./0.png,cat\n": r"labels\.csv:4: '0\.png' .*labels\.csv:3; remove",
    "image,part\n0.png,test\n": r"labels\.csv:1: the columns are image, part; expected",
    "image,class,part\n0.png,cat,train\n": r"labels\.csv:2: 'train' is not a part; allowed: test",
    "image,class\n0.png,cat,test\n": r"labels\.csv:2: 3 cells, but the columns are image, class",
    'image,class\n"0.png,cat\n': r"labels\.csv:2: this is not CSV",
}


@pytest.mark.parametrize("text", BAD_LABELS)
def test_an_invalid_line_of_labels_is_an_error_with_its_place(photos, text):
    (photos / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=BAD_LABELS[text]):
        parts(photos)


BAD_CLASSES = {
    "cat\n\ncat\n": r"classes\.txt:3: the class 'cat' is listed twice, first in .*txt:1; remove",
    "cat\nCAT = Cat\n": r"classes\.txt:2: two classes are named 'Cat' and 'cat', which CLIP reads",
    "cat\na/b\n": r"classes\.txt:2: 'a/b' is not allowed; expected `name` or",
    "cat\n# dog\n": r"classes\.txt has only one class, 'cat'; a classifier needs two or more",
    "": r"classes\.txt has no class",
}


@pytest.mark.parametrize("text", BAD_CLASSES)
def test_an_invalid_list_of_classes_is_an_error_with_its_place(photos, text):
    (photos / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=BAD_CLASSES[text]):
        get_dataset(f"folder:{photos}")


def test_images_that_are_all_labelled_or_missing_are_an_error(photos):
    labels = "".join(f"{path},cat\n" for path in parts(photos))
    (photos / "labels.csv").write_text(f"image,class\n{labels}")
    with pytest.raises(ValueError, match="0 images without a label for 2 classes, but learning"):
        parts(photos)
    empty = photos.parent / "empty"
    empty.mkdir()
    (empty / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="contain no images"):
        parts(empty)


def test_a_copy_of_a_test_image_in_the_pool_is_refused_unless_permitted(photos):
    (photos / "labels.csv").write_text("image,class\n0.png,cat\n")
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    name = f"folder:{photos}"
    words = r"1 pair of equal images, one for test in labels.csv and one not.*'0.png' = 'copy.png'"
    with pytest.raises(ValueError, match=words):
        Resolver(photos.parent / "c.json", None).dataset_by_name(name)
    lines, difference = check_dataset(name, None)
    assert "1 pair of equal images" in str(difference)
    assert "0 in two classes" in lines[-2]  # the class of the copy is unknown
    (photos / "allow_duplicates").touch()
    lines, difference = check_dataset(name, None)
    assert difference is None
    assert "parts       train 12   test 1" in lines


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
