"""Many images: `classify` from paths and memory, to files, and over Ray Data."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from air_core.bundle import load_bundle
from air_core.bundle.manifest import write_bundle
from air_core.datasets.images import ImageFiles, Unreadable
from orchestrator.environment import RAY_JOB
from orchestrator.execution import classify
from orchestrator.execution.classify import MANIFEST, ClassifierActor, ClassifyJob
from tests.helpers.bundles import zero_shot
from tests.helpers.sweeps import python


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A bundle: the zero-shot classifier of the tiny CLIP on the digits."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(folder, *zero_shot(), replace=False)
    return folder


@pytest.fixture(scope="module")
def bundle(folder):
    return load_bundle(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """150 JPEGs of noise and colour of several sizes, in two folders that are named like classes.

    150 are three batches, the last of which is not full.
    """
    home = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    files = []
    for number in range(150):
        folder = home / ("digit_one" if number < 75 else "digit_two")
        folder.mkdir(exist_ok=True)
        height, width = (int(side) for side in rng.integers(20, 120, size=2))
        noise = rng.integers(0, 256, size=(height, width, 3))
        pixels = 0.3 * noise + 0.7 * rng.integers(0, 256, size=3)
        files.append(folder / f"{number:03}.jpg")
        Image.fromarray(pixels.astype(np.uint8)).save(files[-1])
    return files


# ---------------------------------------------------------------- images in Python


def test_threads_change_neither_results_nor_order(bundle, photos):
    step = 64
    batches = [ImageFiles(tuple(photos[i : i + step])) for i in range(0, len(photos), step)]
    shares = torch.cat([bundle.logits(batch).softmax(dim=-1) for batch in batches])  # no threads
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    results = list(bundle.stream(photos, topk=10))
    torch.set_num_threads(before)
    assert [one.image for one in results] == [str(file) for file in photos]
    for result, row in zip(results, shares, strict=True):
        found = [dict(result.top)[name] for name in bundle.classnames]
        assert found == pytest.approx(row.tolist(), abs=1e-6)


def test_paths_pil_images_and_arrays_give_the_same_result_in_one_call(bundle, photos):
    with Image.open(photos[1]) as lazy:
        array = np.asarray(Image.open(photos[2]))
        grey = array[:, :, 0]
        images = [str(photos[0]), lazy, array, grey, lazy, photos[3].parent, photos[0]]
        results = bundle.classify(images, topk=10)
    in_folder = [str(file) for file in photos[:75]]
    assert [one.image for one in results] == [in_folder[0], "#1", "#2", "#3", "#4", *in_folder[1:]]
    by_path = bundle.classify(photos[:3], topk=10)
    for at, expected in ((0, by_path[0]), (1, by_path[1]), (2, by_path[2]), (4, by_path[1])):
        assert dict(results[at].top) == pytest.approx(dict(expected.top), abs=1e-6)
    (from_grey,) = bundle.classify([Image.fromarray(grey)], topk=10)
    assert dict(results[3].top) == pytest.approx(dict(from_grey.top), abs=1e-6)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3)), r"image #0 is an array \(8, 8, 3\) of float64; allowed"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\) of uint8; allowed: \(H, W, 3\)"),
        (np.zeros((0, 8), np.uint8), r"\(0, 8\)"),
        (b"bytes", "image #0 is a bytes; allowed: paths, PIL images and numpy arrays"),
    ],
)
def test_other_arrays_and_types_are_refused(bundle, image, message):
    with pytest.raises(ValueError, match=message):
        bundle.classify([image])


def test_a_damaged_image_in_memory_is_unreadable(bundle, photos, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(photos[0].read_bytes()[:-500])
    with (
        Image.open(tmp_path / "cut.jpg") as image,
        pytest.raises(Unreadable, match="image #0 cannot be read"),
    ):
        bundle.classify([image])


# ---------------------------------------------------------------- files


@pytest.fixture
def damaged(photos, tmp_path) -> Path:
    """A copy of the photos, of which two are unreadable."""
    home = shutil.copytree(photos[0].parents[1], tmp_path / "photos")
    (home / "digit_one" / "003.jpg").write_bytes(b"no image")
    (home / "digit_two" / "149.jpg").write_bytes(b"")
    return home


def rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a table, with None for an empty cell and numbers as numbers."""
    if file.suffix == ".parquet":
        found: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        return found
    if file.suffix == ".jsonl":
        return [*map(json.loads, file.read_text().splitlines())]
    with open(file, newline="") as handle:
        return [
            {
                k: (float(v) if k.startswith("probability") else v) if v else None
                for k, v in r.items()
            }
            for r in csv.DictReader(handle)
        ]


def test_parquet_csv_and_json_lines_have_the_same_rows_also_for_unreadable_images(
    folder, bundle, damaged, command, tmp_path
):
    found = {}
    for suffix in ("parquet", "csv", "jsonl"):
        file = tmp_path / "new" / f"out.{suffix}"
        code, out, err = command("classify", folder, damaged, "-o", file, "--topk", "2")
        assert (code, out) == (1, f"{file}\n")  # some files are unreadable
        assert "accuracy" in err
        assert "2 of 150 files could not be read:" in err
        assert "149.jpg cannot be read: it is empty" in err
        found[suffix] = rows(file)
    assert found["parquet"] == found["csv"] == found["jsonl"]

    table = found["parquet"]
    pairs = ["class", "probability", "class_2", "probability_2"]
    assert list(table[0]) == ["image", *pairs, "true", "error"]
    assert [Path(row["image"]).stem for row in table] == [f"{i:03}" for i in range(150)]
    assert table[3] == dict.fromkeys(table[0]) | {
        "image": str(damaged / "digit_one" / "003.jpg"),
        "true": "digit one",
        "error": table[3]["error"],
    }
    assert table[149]["error"] == f"{damaged}/digit_two/149.jpg cannot be read: it is empty"
    readable = [row for row in table if row["error"] is None]
    files = [Path(row["image"]) for row in readable]
    for row, expected in zip(readable, bundle.stream(files, topk=2), strict=True):
        assert row["class"] == expected.classname
        assert row["probability"] == pytest.approx(expected.probability, abs=1e-6)
        assert (row["class_2"], row["probability_2"]) == pytest.approx(expected.top[1], abs=1e-6)


def test_what_cannot_be_written_is_refused_before_anything_is_read(
    folder, photos, command, tmp_path, monkeypatch
):
    (tmp_path / "full.parquet").mkdir()
    (tmp_path / "full.parquet" / "other.txt").touch()
    (tmp_path / "file.parquet").touch()
    for words, message in (
        (("-o", "out.txt"), "out.txt: the name must end in one of .parquet, .csv, .jsonl"),
        (("-o", "out.csv", "--json"), "exclude each other; give only one"),
        (("-o", tmp_path / "full.parquet"), "is a folder; remove it, or give another -o"),
        (("--address", "local"), "--address needs -o"),
        (("-o", "out.csv", "--address", "local"), "whose name must end in .parquet"),
        (("-o", "o.parquet", "--address", "http://head:8265"), "is not the head of a Ray cluster"),
        (("-o", tmp_path / "full.parquet", "--address", "local"), f"no {MANIFEST}"),
        (("-o", tmp_path / "file.parquet", "--address", "local"), "is a file, but on Ray"),
    ):
        code, out, err = command("classify", folder, photos[0], *words)
        assert (code, out) == (2, ""), err
        assert message in err
    assert not Path("out.csv").exists()

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # as in a Ray job
    monkeypatch.setenv(RAY_JOB, "{}")
    code, out, err = command("classify", folder, photos[0], "-o", "out.parquet")
    assert (code, out) == (2, "")
    assert "out.parquet: the working folder of a Ray job is removed at its end" in err
    assert command("classify", folder, photos[0])[0] == 0  # without -o in this process


STOPPED = """
import os, signal, sys
from orchestrator.reporting import classified
before = classified.sync
classified.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # before the rename
from orchestrator.__main__ import main
main()
"""


def test_a_killed_process_leaves_no_table(folder, photos, tmp_path):
    words = ("airsweep", "classify", folder, photos[0], "-o", tmp_path / "out.csv")
    done = python("-c", f"import sys; sys.argv = {[*map(str, words)]}\n{STOPPED}", check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.csv").exists()


# ---------------------------------------------------------------- Ray


@pytest.fixture
def blocks_of_eight(monkeypatch) -> None:
    monkeypatch.setattr(classify, "BLOCK", 8)


def part_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.glob("part-*.parquet")) for row in rows(part)]


def assert_equal_rows(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    for row, other in zip(some, others, strict=True):
        numbers = {name for name in row if name.startswith("probability")}
        assert {k: row[k] for k in row if k not in numbers} == {
            k: other[k] for k in other if k not in numbers
        }
        for name in numbers:
            assert row[name] == pytest.approx(other[name], abs=1e-6)


@pytest.mark.ray
def test_ray_gives_the_rows_of_one_process_and_refuses_the_folder_of_another_job(
    ray_session, blocks_of_eight, folder, damaged, command, tmp_path
):
    alone, on_ray = tmp_path / "alone.parquet", tmp_path / "ray.parquet"
    words = ("classify", folder, damaged, "--topk", "2")
    code, _, expected = command(*words, "-o", alone)
    assert code == 1
    code, out, err = command(*words, "-o", on_ray, "--address", "local")
    assert (code, out) == (1, f"{on_ray}\n")
    assert err == expected  # accuracy, confusion matrix and unreadable images
    assert len([*on_ray.glob("part-*")]) == 19  # 150 images in blocks of 8
    assert_equal_rows(part_rows(on_ray), rows(alone))
    assert pq.read_table(on_ray).num_rows == 150  # the folder is one table

    about, arrays = zero_shot()
    write_bundle(tmp_path / "other", {**about, "lineage": {"sweep": "x"}}, arrays, replace=False)
    for changed, message in (
        ((tmp_path / "other", damaged), "has the results of another bundle; give another -o"),
        ((folder, damaged / "digit_one"), "of another list of images or true classes"),
        ((folder, damaged, "--topk", "3"), "of another number of classes per image (--topk)"),
    ):
        more = () if "--topk" in changed else ("--topk", "2")
        code, out, err = command("classify", *changed, *more, "-o", on_ray, "--address", "local")
        assert (code, out) == (2, ""), err
        assert message in err
    assert_equal_rows(part_rows(on_ray), rows(alone))


KILLED = """
import os, signal
from orchestrator.environment import RAY_JOB
from orchestrator.execution import classify
classify.BLOCK = 8
every = classify.classify_on_ray
def killed(job):
    for count, index in enumerate(every(job), start=1):
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield index
classify.classify_on_ray = killed
from orchestrator.__main__ import main
main()
"""


@pytest.mark.ray
@pytest.mark.integration
def test_the_same_command_after_a_kill_classifies_what_is_missing(
    ray_session, blocks_of_eight, folder, damaged, command, tmp_path
):
    words = ("classify", folder, damaged, "--address", "local", "-o")
    out = tmp_path / "killed.parquet"
    arguments = ["airsweep", *map(str, words), str(out)]
    done = python("-c", f"import sys; sys.argv = {arguments}\n{KILLED}", check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = {part: part.stat().st_ino for part in out.glob("part-*")}
    assert 3 <= len(before) < 19
    assert command(*words, out)[0] == 1
    assert all(part.stat().st_ino == inode for part, inode in before.items())
    assert command(*words, tmp_path / "whole.parquet")[0] == 1
    assert_equal_rows(part_rows(out), part_rows(tmp_path / "whole.parquet"))
    assert len(part_rows(out)) == 150


@pytest.fixture
def job(folder, photos, tmp_path) -> ClassifyJob:
    out = tmp_path / "out.parquet"
    out.mkdir()
    (out / MANIFEST).touch()
    names = ("image", "class", "probability", "error")
    return ClassifyJob(folder, None, "cpu", None, 0.0, "torch", names, photos[:8], {}, out)


def result_of_block(job: ClassifyJob) -> dict[str, Any]:
    batch = {"block": np.array([0]), "files": np.array([json.dumps(job.block(0))])}
    return {name: value for name, (value,) in ClassifierActor(job, 1)(batch).items()}


@pytest.mark.parametrize("lost", ["bundle", "folder", "files"])
def test_a_machine_that_does_not_see_the_folders_stops_the_job(job, lost, tmp_path):
    gone = tmp_path / "gone"
    changed = ClassifyJob(**{**vars(job), lost: [gone] if lost == "files" else gone})
    result = result_of_block(changed)
    assert result["by_user"]
    assert f"{gone}" in result["error"]
    assert "must be in folders that all machines of the cluster share" in result["error"]
    assert not changed.part(0).exists()


def test_a_block_that_kills_its_process_is_given_up(job):
    for _ in range(3):  # three processes have begun it
        with open(job.tries(0), "ab") as handle:
            handle.write(b"x")
    assert "images 1 to 512 of the list killed 3 processes" in result_of_block(job)["error"]
    job.tries(0).unlink()
    assert result_of_block(job)["error"] == ""
    assert [row["image"] for row in rows(job.part(0))] == [*map(str, job.files)]
    assert not job.tries(0).exists()
