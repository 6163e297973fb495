"""Many images: `classify` from paths and memory, to files, and `Classifier` on Ray Data."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from air_core.bundle import load_bundle
from air_core.bundle.manifest import write_bundle
from air_core.datasets import get_dataset
from orchestrator import api
from orchestrator.reporting.classified import write_file
from tests.helpers.bundles import zero_shot
from tests.helpers.documents import ROOT
from tests.helpers.golden import check_refusals


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
        (b"bytes", "image #0 is a bytes; allowed: paths, PIL images and numpy arrays"),
    ],
)
def test_other_arrays_and_types_are_refused(bundle, image, message):
    with pytest.raises(ValueError, match=message):
        bundle.classify([image])


# ---------------------------------------------------------------- files


@pytest.fixture
def damaged(photos, tmp_path) -> Path:
    """A copy of the photos, of which two are unreadable."""
    home = shutil.copytree(photos[0].parents[1], tmp_path / "photos")
    (home / "digit_one" / "003.jpg").write_bytes(b"no image")
    (home / "digit_two" / "149.jpg").write_bytes(b"")
    return home


def test_parquet_csv_and_json_have_the_same_rows_also_for_unreadable_images(
    folder, bundle, damaged, command, tmp_path
):
    words = ("classify", folder, damaged, "--topk", "2")
    code, out, err = command(*words, "--json")
    assert code == 1  # some files are unreadable
    assert "accuracy" in err
    assert "2 of 150 files could not be read:" in err
    assert "149.jpg cannot be read: it is empty" in err
    table = json.loads(out)
    for suffix in ("parquet", "csv"):
        file = tmp_path / "new" / f"out.{suffix}"
        assert command(*words, "-o", file) == (1, f"{file}\n", err)
        assert rows(file) == table
    (tmp_path / "out.csv").write_text(command(*words, "--csv")[1])
    assert rows(tmp_path / "out.csv") == table
    frame = api.classify(folder, [damaged], topk=2)
    assert frame.astype(object).where(frame.notna(), None).to_dict("records") == table

    pairs = ["class", "probability", "class_2", "probability_2"]
    assert list(table[0]) == ["path", *pairs, "error", "true"]
    assert [Path(row["path"]).stem for row in table] == [f"{i:03}" for i in range(150)]
    assert table[3] == dict.fromkeys(table[0]) | {
        "path": str(damaged / "digit_one" / "003.jpg"),
        "true": "digit one",
        "error": table[3]["error"],
    }
    assert table[149]["error"] == f"{damaged}/digit_two/149.jpg cannot be read: it is empty"
    readable = [row for row in table if row["error"] is None]
    for row, expected in zip(
        readable, bundle.classify([row["path"] for row in readable]), strict=True
    ):
        assert (row["class"], row["probability"]) == pytest.approx(expected.top[0], abs=1e-6)
        assert (row["class_2"], row["probability_2"]) == pytest.approx(expected.top[1], abs=1e-6)


def rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a table, with None for an empty cell."""
    frame = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    found: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return found


def test_refusals_equal_the_golden_messages(folder, photos, command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full.parquet").mkdir()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    check_refusals(
        "messages/classify.txt",
        functools.partial(command, "classify"),
        (folder, tmp_path / "empty"),
        (folder, tmp_path / "no.png"),
        (folder, tmp_path / "*.jpg"),
        (folder, bad),
        (folder, bad, "--json", "--csv"),
        (folder, bad, "--json", "-o", "out.csv"),
        (folder, bad, "-o", "out.txt"),
        (folder, bad, "-o", tmp_path / "full.parquet"),
        (folder, bad, "--weights", tmp_path / "x"),
        (tmp_path, bad),
        bundle=folder,
        here=tmp_path,
    )
    assert not Path("out.csv").exists()


def test_class_folders_have_accuracy_and_confusions_and_text_the_rows(folder, command, tmp_path):
    examples = get_dataset("digits").load(None)
    new = tmp_path / "new"
    names = {0: "digit_zero", 1: "digit one", 2: "Digit_Two", 3: "unknown"}
    for name in names.values():
        (new / name).mkdir(parents=True)
    for i in np.flatnonzero(np.isin(examples.labels, (0, 1, 2)))[:12]:
        examples.images[i].save(new / names[examples.labels[i]] / f"{i}.png")
    examples.images[0].save(new / "unknown" / "x.png")
    (new / names[2] / "bad.png").write_bytes(b"")
    (new / names[2] / "IMG.MOV").write_bytes(b"")

    code, out, err = command("classify", folder, new, "--json", "--topk", "2")
    found = [one for one in json.loads(out) if one["error"] is None]
    assert code == 1
    assert [one["true"] for one in found].count(None) == 1
    right = sum(one["class"] == one["true"] for one in found)
    assert f"accuracy {right / 12:.1%}: {right} of 12 images in class folders\n" in err
    assert "skipped: 1 .mov\n1 of 14 files could not be read:\n" in err

    lines = command("classify", folder, new, "--topk", "2")[1].splitlines()
    for one, line in zip(found, lines, strict=False):
        best = f"{one['class']} {one['probability']:.1%}"
        second = f"{one['class_2']} {one['probability_2']:.1%}"
        assert " ".join(line.split()).endswith(f"{one['path'][-9:]} {best} {second}")
    wrong = Counter((one["true"], one["class"]) for one in found if one["true"] is not None)
    start = lines.index("most frequent confusions (folder -> predicted class)") + 1
    assert [" ".join(line.split()) for line in lines[start:]] == [
        f"{count} {true} -> {name}" for (true, name), count in wrong.most_common() if true != name
    ]
    assert "accuracy" not in command("classify", folder, f"{new}/{names[2]}/*.png")[1]


def test_an_image_with_a_small_probability_is_unsure(folder, photos, command):
    new = photos[0].parent
    every = load_bundle(folder).classify([new])
    limit = sorted(result.probability for result in every)[10]
    found = load_bundle(folder, min_probability=limit).classify([new])
    assert [one.classname == "unsure" for one in found] == [
        one.probability < limit for one in every
    ]
    assert [one.top for one in found] == [one.top for one in every]
    words = ("classify", folder, new, "--min-probability", limit)
    code, out, err = command(*words, "--json")
    assert (code, [row["class"] for row in json.loads(out)]) == (0, [c.classname for c in found])
    assert f"unsure: 10 of 75 images, below {limit:g}" in err
    lines = [" ".join(line.split()[1:]) for line in command(*words)[1].splitlines()]
    for line, one in zip(lines, found, strict=False):
        assert line.startswith(f"{one.top[0][0]} {one.probability:.1%}")
        assert line.endswith("unsure") == one.is_unsure


def test_an_interrupted_process_leaves_no_table(tmp_path):
    def interrupted() -> Iterator[dict[str, Any]]:
        yield from [{"path": "a.png", "class": "one", "probability": 0.5, "error": None}] * 10_000
        assert [*tmp_path.iterdir()]  # a part is written
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "out.parquet", interrupted())
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------- Ray Data


@pytest.mark.ray
def test_the_recipe_for_ten_million_images_gives_the_rows_of_one_process(
    ray_session, folder, damaged, tmp_path, monkeypatch
):
    """In three chunks, the second of which begins anew after a kill."""
    (tmp_path / "bundle").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "recipes.md").read_text()
    [recipe] = re.findall(r"## Ten million images\n.*?```python\n(.*?)```", page, re.DOTALL)
    recipe = recipe.replace("50_000", "64")
    recipe = recipe.replace('"num_cpus": 4, "concurrency": 8', '"num_cpus": 1, "concurrency": 1')
    unfinished = Path("classes/00000064.partial")
    unfinished.mkdir(parents=True)
    (unfinished / "old.parquet").write_bytes(b"half a file")
    exec(recipe, {})
    parts = sorted(Path("classes").iterdir())
    assert [part.name for part in parts] == ["00000000", "00000064", "00000128"]
    before = {file: file.stat().st_ino for file in Path("classes").rglob("*.parquet")}
    exec(recipe, {})
    assert {file: file.stat().st_ino for file in Path("classes").rglob("*.parquet")} == before

    found = pq.read_table("classes").sort_by("path").to_pylist()
    for row, expected in zip(
        found, load_bundle(folder).rows(sorted(damaged.rglob("*.jpg")), 1), strict=True
    ):
        assert row == expected | {"probability": pytest.approx(expected["probability"], abs=1e-6)}
    assert [row["error"] is None for row in found].count(False) == 2
