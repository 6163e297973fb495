"""Numbers that stay right: damaged files, changed and missing datasets, through real runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from air_core.specs import FeaturesSpec, FolderImages
from orchestrator.planning import Resolver
from orchestrator.stages.build import build_features
from orchestrator.stages.context import ChangedInput, WorkerContext
from orchestrator.stages.image_rows import open_generator
from orchestrator.store import ArtifactStore
from tests.helpers.sweeps import write_sweep

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

AIR = """
grid: {{method: [zero_shot, air_fpl]}}
fixed:
  dataset: "folder:{folder}"
  images_per_class: 4
  generation.block: 4
  train.steps: 5
  lora.steps: 2
  lora.rounds: 1
  generation.num_inference_steps: 2
seeds: [1]
tracking: {{uri: none}}
"""
OWN = """
grid: {{method: [zero_shot, fpl, air_fpl]}}
fixed:
  dataset: "folder:{folder}"
  train.steps: 5
  lora: null
  images_per_class: 2
  generation.block: 2
  generation.num_inference_steps: 2
seeds: [1]
tracking: {{uri: none}}
"""

CLASSES = ("digit 0", "digit 1")
Command = Callable[..., tuple[int, str, str]]


def flip(file: Path, at: int = -2) -> Path:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)
    return file


@pytest.fixture
def numbers(command: Command, tmp_path) -> Callable[..., str]:
    """The table of a sweep, as a script reads it."""

    def read(name: str, store: Path = tmp_path / "runs") -> str:
        code, out, err = command("table", name, "--store", store, "--format", "json")
        assert code == 0, err
        return out

    return read


def test_a_flipped_byte_in_any_artifact_is_named_and_the_same_run_makes_it_again(
    command, numbers, folder, tmp_path
):
    store = tmp_path / "runs"
    sweep = write_sweep(tmp_path, "flipped", AIR.format(folder=folder))
    assert command("run", sweep, "--store", store, "--quiet")[0] == 0
    before = numbers("flipped")
    artifacts = store / "artifacts"

    def one(pattern: str) -> Path:
        return sorted(artifacts.glob(pattern))[-1]

    def rows(stage: str, *within: str) -> Iterator[Path]:
        """Folders of rows that were drawn with a LoRA."""
        for file in artifacts.glob(f"{stage}/*/*/row.json"):
            spec = json.loads(file.read_text())["spec"]
            for name in within:
                spec = spec[name]
            if spec is not None:
                yield file.parent

    # Features and LoRA are read again only where something is missing: the trial of air_fpl, and
    # one block of images; of another block the images are read to be encoded again.
    (trial,) = (
        path.parent
        for path in artifacts.glob("trials/*/*/record.json")
        if json.loads(path.read_text())["spec"]["iterations"]
    )
    shutil.rmtree(trial)
    (images,) = rows("images", "lora")
    (features,) = rows("synthetic", "images", "lora")
    (images / "0000-00000.parquet").unlink()
    (features / "0000-00000.safetensors").unlink()
    (features / "0001-00000.safetensors").unlink()
    damaged = [
        flip(one("features/*/*/features.safetensors")),
        flip(one("labels/*/*/labels.safetensors")),
        flip(one("lora/*/*/record.json")),
        flip(one("trials/*/*/predictions.safetensors")),
        flip(features / "0002-00000.safetensors"),
        flip(images / "0001-00000.parquet"),
    ]
    code, _, err = command("table", "flipped", "--store", store)
    assert code == 2
    assert "predictions.safetensors does not match its digest in the record" in err
    code, _, err = command("run", sweep, "--store", store)
    assert code == 0, err
    for file in damaged[:-1]:  # the last one is drawn again by the worker that reads it
        whole = file if file.parent == features else file.parent
        assert f"{whole} was damaged" in err
        assert list(whole.parent.glob(f".damaged-{whole.name}-*"))
    assert list(images.glob(".damaged-0001-00000.parquet-*"))
    assert numbers("flipped") == before
    assert command("cache", "verify", "--store", store)[0] == 0
    again = command("run", sweep, "--store", store)
    assert "nothing to do" in again[2]


# ---------------------------------------------------------------- datasets that change


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """119 digits in class folders."""
    from air_core.datasets.digits import load

    folder = tmp_path_factory.mktemp("own") / "leaves"
    pictures, labels, _ = load()
    for i in range(119):
        (folder / f"digit {labels[i]}").mkdir(parents=True, exist_ok=True)
        pictures[i].save(folder / f"digit {labels[i]}" / f"{i:03}.png")
    return folder


@pytest.fixture
def folder(images, tmp_path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "leaves"))


def rename(folder: Path) -> None:
    next(folder.rglob("*.png")).rename(folder / "digit 0" / "zzz.png")


def add(folder: Path) -> None:
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(folder / "digit 0" / "new.png")


def remove(folder: Path) -> None:
    next(folder.rglob("*.png")).unlink()


def move_away(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def test_finished_results_stay_when_the_folder_changes_or_moves(
    command, numbers, folder, tmp_path, caplog
):
    store, copy = tmp_path / "runs", tmp_path / "copied"
    sweep = write_sweep(tmp_path, "own", OWN.format(folder=folder))
    assert command("run", sweep, "--store", store, "--quiet")[0] == 0
    before = numbers("own")
    whole = {file for file in (store / "artifacts").rglob("*") if file.is_file()}
    whole_folder = Path(shutil.copytree(folder, tmp_path / "as it was"))
    shutil.copytree(store, copy)
    for change in (rename, add, remove, move_away):
        change(folder)
        assert numbers("own") == before
        assert numbers("own", copy) == before
        report = command("report", "own", "-o", tmp_path / "report.html", "--store", store)
        assert report[0] == 0, report[2]
        bundle = tmp_path / f"bundle {change.__name__}"
        words = ("export", "best", "--sweep", "own", "--only", "method=fpl", "-o", bundle)
        exported = command(*words, "--store", store)
        assert exported[0] == 0, exported[2]
        audit = command("audit", "own", "--store", store)
        assert audit[0] == 0, audit[2]
        assert command("cache", "gc", "--yes", "--store", store)[0] == 0
        assert {file for file in (store / "artifacts").rglob("*") if file.is_file()} == whole
        planned = command("plan", sweep, "--store", store)
        if change is move_away:
            assert (planned[0], str(folder) in planned[2]) == (2, True)
        else:
            assert planned[0] == 0
            words = "the folder changed since: 3 results are of the earlier content"
            assert f"folder:{folder}: {words}" in planned[1]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole_folder, folder)
    assert "0 to run" in command("plan", sweep, "--store", store)[1]

    resolved = flip(store / "sweeps/default/own/resolved.json", at=40)
    code, _, err = command("table", "own", "--store", store)
    assert code == 2
    assert f"{resolved} is damaged" in err
    caches = [flip(store / name, at=40) for name in ("history.json", "digests.json")]
    assert command("run", sweep, "--store", store)[0] == 0  # there is nothing to do
    assert all(f"{file} is damaged and is computed again" in caplog.text for file in caches)
    assert numbers("own") == before


def test_a_run_after_a_change_says_so_and_computes_the_new_content(
    command, numbers, folder, tmp_path
):
    store = tmp_path / "runs"
    sweep = write_sweep(tmp_path, "own", OWN.format(folder=folder))
    assert command("run", sweep, "--store", store, "--quiet")[0] == 0
    before = numbers("own")
    remove(folder)
    code, _, err = command("run", sweep, "--store", store)
    assert code == 0
    assert "the folder changed since: 3 results are of the earlier content" in err
    assert numbers("own") != before
    assert len(list((store / "artifacts").glob("features/*/*/record.json"))) == 2


def test_what_is_encoded_is_what_was_digested_or_it_is_an_error(folder, tmp_path):
    def features() -> FeaturesSpec:
        resolver = Resolver(tmp_path / "digests.json", None)
        return FeaturesSpec(
            dataset=resolver.named(f"folder:{folder}").ref,
            backbone=resolver.weights("backbone", "tiny"),
        )

    def left() -> Iterator[Path]:
        return (store.artifacts / "features").rglob("record.json")

    store = ArtifactStore(tmp_path / "runs")
    planned = features()
    for classes in folder.iterdir():  # ten files
        next(classes.iterdir()).unlink()
    with pytest.raises(ChangedInput, match="has changed since the run was planned"):
        build_features(planned, WorkerContext(store))
    # And while images are read: this is called after the last one.
    with pytest.raises(ChangedInput):
        build_features(features(), WorkerContext(store), lambda done, total: add(folder))
    assert not list(left())
    build_features(features(), WorkerContext(store))
    assert len(list(left())) == 1


def test_ready_images_that_change_after_the_plan_are_an_error(folder, tmp_path):
    def row() -> FolderImages:
        resolver = Resolver(tmp_path / "digests.json", None)
        model = resolver.weights("generator", f"folder:{folder}")
        return FolderImages(model=model, classnames=CLASSES, size=8, block=2)

    worker = WorkerContext(ArtifactStore(tmp_path / "runs"))
    planned = row()
    first, second = sorted((folder / CLASSES[0]).iterdir())[:2]
    first.rename(first.with_name("zzz.png"))
    with pytest.raises(ChangedInput, match="has changed since the run was planned"):
        open_generator(planned, worker)
    generator = open_generator(row(), worker)
    assert generator.generate(CLASSES[0], [0, 1], [0, 0]).shape == (2, 8, 8, 3)
    second.write_bytes(second.read_bytes() + b" ")
    with pytest.raises(ValueError, match="was changed while its folder was read"):
        generator.generate(CLASSES[0], [0, 1], [0, 0])
