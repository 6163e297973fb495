"""A first sweep file for somebody's own images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.planning import plan_of, read_request
from orchestrator.spec import cells_of
from orchestrator.spec.starter import write_starter
from orchestrator.store import ArtifactStore, SweepLocation
from tests.helpers.sweeps import airsweep, table

METHODS = ["zero_shot", "fpl", "cpl", "air", "cpl_real"]


def draw(home: Path, counts: dict[str, int]) -> Path:
    """Small images of noise in class folders; `train/a` is one too."""
    noise = np.random.default_rng(0)
    for folder, count in counts.items():
        (home / folder).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / folder / f"{i}.png")
    return home


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_counts_what_the_folder_holds_and_can_be_planned(here):
    draw(here / "leaves", {"oak": 20, "red_maple": 12})
    starter = write_starter("mine", "leaves", Path())
    assert starter.file == Path("mine.yaml")
    assert starter.found == (
        "leaves: 32 images of 2 classes (oak 20, red maple 12); 3 for validation, about 10 for "
        "test, as `split_seed` parts them"
    )
    spec = read_request("mine.yaml").spec
    assert spec.name == "mine"
    assert starter.found in spec.question.replace("\n", " ")
    assert "about 10 test images tell little" in spec.question.replace("\n", " ")
    assert spec.fixed["dataset"] == "folder:leaves"
    assert [cell.method for cell in cells_of(spec)] == METHODS
    plan = plan_of(spec, SweepLocation(ArtifactStore(here / "runs"), "default", "mine", None))
    assert plan.total == 15
    assert plan.slots[0].spec.classnames == ("oak", "red maple")


def test_without_a_folder_it_is_a_sweep_of_the_digits(here):
    assert "1,797 real digits" in write_starter("mine.yaml", None, Path()).found
    assert read_request("mine.yaml").spec.fixed["dataset"] == "digits"


def test_fixed_parts_are_counted_as_they_are(here):
    draw(here / "x", {"train/a": 20, "train/b": 20, "test/a": 3, "test/b": 4})
    found = write_starter("mine", "x", Path()).found
    assert found == "x: 47 images of 2 classes (a 23, b 24); train 36, val 4, test 7"


@pytest.mark.parametrize("name", ["my images", "übung", "it's #1: {all}", 'a "b" \\ c', "~x"])
def test_any_visible_name_of_a_folder_survives(here, name):
    draw(here / name, {"a": 4, "b: {c}": 4})
    write_starter("mine", str(here / name), Path())
    assert read_request("mine.yaml").spec.fixed["dataset"] == f"folder:{here / name}"


BAD = {
    "nowhere": ({}, "does not exist or is not a folder"),
    "empty": ({".": 0}, "holds no image (.bmp, .gif"),
    "flat": ({".": 3}, "holds 3 images and no class folders"),
    "hollow": ({"a": 4, "b": 0}, "no image in b/, which contains nothing"),
    "one": ({"a": 9}, "only one class, 'a'"),
    "few": ({"a": 9, "b": 3}, "fewer than 4 images of 'b'"),
    "half": ({"train/a": 4, "train/b": 4}, "but no test"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_is_no_dataset_is_one_sentence_and_no_file(here, name):
    counts, words = BAD[name]
    draw(here / name, counts)
    before = sorted(here.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        write_starter("mine", name, Path())
    assert "\n" not in str(caught.value)
    assert sorted(here.rglob("*")) == before


def test_a_file_that_is_there_stays_as_it_is(here):
    (here / "mine.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"mine\.yaml is there already"):
        write_starter("mine", None, Path())
    assert (here / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "a b", "../x", "ä", ".x", "x" * 65])
def test_a_name_that_no_sweep_may_have_is_refused(here, name):
    with pytest.raises(ValueError, match="is no name of a sweep"):
        write_starter(name, None, Path())
    assert list(here.iterdir()) == []


@pytest.mark.integration
@pytest.mark.ray
def test_the_smallest_folder_there_may_be_runs_as_smoke(here):
    draw(here / "x", {"a": 4, "b": 4})
    airsweep("init", "mine", "--images", "x")
    # One method that needs all of it: the five take three times as long.
    airsweep("run", "mine.yaml", "--smoke", "--quiet", "--only", "method=air")
    assert [row["method"] for row in table(here / "runs-smoke", "mine")] == ["air"]
    # Of two steps and one block it knows the pace; what loading took is apart.
    history = json.loads((here / "runs-smoke/history.json").read_text())
    for stage in ("lora", "images"):
        [pace] = history[stage].values()
        assert pace["starts"] >= 1
        assert pace["startup"] > 0
        assert 0 < pace["seconds"] / pace["units"] < pace["startup"]
