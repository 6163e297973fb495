"""`airsweep init`: a first sweep file for a folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.planning import Plan, plan_of, read_request
from orchestrator.spec import SweepSpec, cells_of, notes_of
from orchestrator.spec.presets import SETUP_ONLY
from orchestrator.spec.starter import write_starter
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore, SweepLocation
from tests.helpers.golden import check_refusals
from tests.helpers.inputs import build_inputs

METHODS = ["zero_shot", "cpl", "cpl_real", "cpl_real_evidence", "air", "air_control"]


def draw(home: Path, counts: dict[str, int]) -> Path:
    """Write small images of noise into class folders such as `a` or `train/a`."""
    noise = np.random.default_rng(0)
    for folder, count in counts.items():
        (home / folder).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / folder / f"{i}.png")
    return home


def plan(sweep: SweepSpec) -> Plan:
    return plan_of(sweep, SweepLocation(ArtifactStore(Path("runs")), "default", "mine", None))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_describes_the_folder_and_can_be_planned(folder):
    draw(folder / "leaves", {"oak": 20, "red_maple": 12})
    starter = write_starter("mine", "leaves", Path())
    assert starter.file == Path("mine.yaml")
    assert starter.summary == (
        "leaves: 32 images of 2 classes (oak 20, red maple 12); about 10 for test, split by "
        "`split_seed`, 3 for validation, to choose the best classifier"
    )
    spec = read_request("mine.yaml").spec
    question = spec.question.replace("\n", " ")
    assert starter.summary in question
    assert "with about 10 test images, differences below 10 points" in question
    assert spec.fixed["dataset"] == "folder:leaves"
    assert [cell.method for cell in cells_of(spec)] == METHODS
    assert notes_of(spec) == (SETUP_ONLY,)
    assert plan(spec).total == 18
    assert plan(spec).slots[0].spec.pool == "train"  # without the validation images


def test_a_file_in_another_folder_finds_the_images(folder):
    draw(folder / "leaves", {"oak": 20, "red_maple": 12})
    (folder / "specs").mkdir()
    file = write_starter("mine", "leaves", folder / "specs").file
    sweep = read_request(file).spec
    assert sweep.fixed["dataset"] == "folder:../leaves"
    assert plan(sweep).slots[0].spec.classnames == ("oak", "red maple")


@pytest.mark.parametrize("name", ["my images", "übung", "it's #1: {all}", 'a "b" \\ c', "~x"])
def test_a_folder_may_have_any_visible_name(folder, name):
    draw(folder / name, {"a": 5, "b: {c}": 5})
    write_starter("mine", str(folder / name), Path())
    assert read_request("mine.yaml").spec.fixed["dataset"] == f"folder:{folder / name}"


def test_refusals_equal_the_golden_messages_and_no_file_is_written(folder, command):
    draw(folder / "flat", {".": 8})
    draw(folder / "listed", {".": 8})
    (folder / "listed" / "classes.txt").write_text("cat\ndog\n")
    draw(folder / "empty", {".": 0})
    draw(folder / "hollow", {"a": 4, "b": 0})
    before = sorted(folder.rglob("*"))
    classes = ("cat", "cat,,dog", "cat,dog,Cat", "nowhere.txt", "cat,dog,cow")
    check_refusals(
        "messages/init.txt",
        lambda *words: command("init", "mine", "--images", *words),
        *((name,) for name in ("nowhere", "empty", "flat", "hollow")),
        *(("flat", "--classes", names) for names in classes),
        ("listed", "--classes", "cat,cow"),
        folder=folder,
    )
    assert sorted(folder.rglob("*")) == before


def test_unlabelled_images_get_their_classes_from_the_option(folder):
    draw(folder / "photos", {".": 3, "trip": 6})
    (folder / "names.txt").write_text("cat\nsea_lion = a sea lion\n")
    found = write_starter("mine", "photos", Path(), "names.txt").summary
    assert found == (
        "photos: 9 images for 2 classes (cat, a sea lion); 9 unlabelled, none labelled, "
        "so no accuracy can be measured; names of folders are ignored"
    )
    assert (folder / "photos/classes.txt").read_text() == (folder / "names.txt").read_text()
    spec = read_request("mine.yaml").spec
    assert "Expect: no accuracy" in spec.question.replace("\n", " ")
    assert notes_of(spec) == (SETUP_ONLY,)
    assert plan(spec).slots[0].spec.classnames == ("cat", "a sea lion")

    (folder / "photos/labels.csv").write_text("image,class\n0.png,cat\n")
    again = write_starter("second", "photos", Path(), "cat,sea_lion = a sea lion").summary
    assert "8 unlabelled, 1 labelled for test and 0 for validation in labels.csv" in again
    assert write_starter("third", "photos", Path()).summary == again  # classes.txt is enough


def test_an_unfit_name_is_refused_and_no_file_overwritten(folder):
    for name in ("", "a b", "../x", "ä", ".x", "x" * 65):
        with pytest.raises(ValueError, match="is not a valid name of a sweep"):
            write_starter(name, None, Path())
    assert list(folder.iterdir()) == []
    assert "1,797 real digits" in write_starter("mine.yaml", None, Path()).summary
    written = (folder / "mine.yaml").read_text()
    assert read_request("mine.yaml").spec.fixed["dataset"] == "digits"
    with pytest.raises(ValueError, match=r"mine\.yaml already exists"):
        write_starter("mine", None, Path())
    assert (folder / "mine.yaml").read_text() == written


def test_the_smallest_allowed_folder_passes_every_stage_of_a_smoke_run(folder):
    draw(folder / "x", {"a": 5, "b": 5})  # images of noise, which CLIP takes for one class
    file = write_starter("mine", "x", Path()).file
    sweep = read_request(file, only=["method=air,air_control,cpl_real"], smoke=True).spec
    store = ArtifactStore(Path("runs"))
    for slot in plan(sweep).slots:
        build_inputs(slot.spec, WorkerContext(store))
        assert 0 <= run_trial(slot.spec, store).metrics["test/accuracy"] <= 1
