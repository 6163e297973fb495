"""`airsweep data check`: is a dataset the published one, can its images be opened?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from air_core.datasets import DATASETS
from air_core.datasets.published import PUBLISHED, Counts
from orchestrator.datacheck import check
from tests.air_core.dataset_trees import draw, small, small_root


def data_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "data", "check", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def as_published(name: str) -> Counts:
    """The small tree's own numbers, as if they were the published ones."""
    counts = {part: (small(name).parts == part).sum() for part in ("train", "val", "test", "free")}
    parts = {
        part: int(sum(counts[one] for one in part.split("+"))) for part in PUBLISHED[name].parts
    }
    return Counts(len(DATASETS[name].classnames), parts)


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_as_published_has_no_difference(name, monkeypatch):
    monkeypatch.setitem(PUBLISHED, name, as_published(name))
    found = check(name, small_root(name))
    assert found.difference is None
    assert found.classnames == DATASETS[name].classnames
    assert found.images == len(small(name).labels)
    assert found.unreadable == ()


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_a_small_copy_is_not_the_published_dataset(name):
    found = check(name, small_root(name))
    assert found.difference is not None
    assert "published" in found.difference


def test_the_first_difference_is_the_class_where_images_are_missing():
    difference = "resisc45: class 'airplane' has 10 images, published 700"
    assert check("resisc45", small_root("resisc45")).difference == difference


def test_another_split_is_a_difference(tmp_path, monkeypatch):
    shutil.copytree(small_root("eurosat"), tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(PUBLISHED, "eurosat", as_published("eurosat"))
    names = [folder.name for folder in (tmp_path / "eurosat/2750").iterdir()]
    (tmp_path / "eurosat/test.txt").write_text("".join(f"{c}_1.jpg\n" for c in names))
    assert check("eurosat", tmp_path).difference == (
        "eurosat: train+val has 90 images, published 81 ()"
    )


def test_unreadable_images_are_counted_and_a_difference_from_the_published(tmp_path, monkeypatch):
    shutil.copytree(small_root("dtd"), tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(PUBLISHED, "dtd", as_published("dtd"))
    for file in sorted((tmp_path / "dtd/dtd/images/lined").iterdir())[:5]:
        file.write_bytes(b"")
    found = check("dtd", tmp_path)
    assert len(found.unreadable) == 5
    assert found.difference is not None
    assert "5 of 282 images cannot be read, 0 may; the first: " in found.difference
    assert len(found.json()["unreadable"]["first"]) == 3


def test_a_few_bad_images_of_ones_own_are_reported_and_more_are_a_difference(tmp_path):
    for name in ("cat", "dog"):
        for i in range(100):
            draw(tmp_path / name / f"{i:02}.png", size=4)
    for i, allowed in enumerate((True, True, False)):
        (tmp_path / "dog" / f"{i:02}.png").write_bytes(b"no image")
        found = check(f"folder:{tmp_path}", None)
        assert len(found.unreadable) == i + 1
        assert (found.difference is None) == allowed


def test_what_cannot_be_listed_is_the_difference(tmp_path):
    assert "flowers102 is not in" in str(check("flowers102", tmp_path).difference)
    assert "is not there" in str(check(f"folder:{tmp_path}/nope", None).difference)
    assert "unknown dataset" in str(check("digitz", None).difference)


# ---------------------------------------------------------------- the command


def test_the_command_prints_counts_and_ends_with_0_when_all_fits():
    done = data_check("digits")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "digits: 1,797 images of 10 classes",
        "parts       val 180   free 1,617",
        "unreadable  0",
    ]
    assert done.stderr == ""


def test_the_command_ends_with_2_and_the_difference_on_stderr():
    done = data_check("eurosat", "--root", str(small_root("eurosat")), "--json")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert found["parts"] == {"train": 71, "val": 10, "test": 19}
    assert found["unreadable"] == {"count": 0, "first": []}
    assert done.stderr == f"airsweep: {found['difference']}\n"
    assert "eurosat: train+val has 81 images, published 22,000" in found["difference"]


def test_the_command_says_on_stderr_alone_what_is_not_there(tmp_path):
    done = data_check("cub", "--root", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"airsweep: cub is not in {tmp_path}: looked for")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from orchestrator.__main__ import app\n"
        "try: app(['data', 'check', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({'numpy', 'PIL', 'torch', 'ray'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "NAME" in done.stdout
    assert done.stderr.strip() == ""
