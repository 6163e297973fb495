"""Damaged files, and datasets that change or disappear, do not change results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.planning import Resolver
from orchestrator.stages import FeaturesSpec, FolderImages
from orchestrator.stages.context import ChangedInput, WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.store import ArtifactStore
from tests.helpers.sweeps import table, write_sweep

AIR = """
grid: {{method: [zero_shot, air_fpl]}}
fixed:
  dataset: "folder:{folder}"
  images_per_class: 4
  generation.block: 4
  train.steps: 5
  lora.steps: 2
  generation.num_inference_steps: 2
seeds: [1]
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
"""

CLASSES = ("digit zero", "digit one")


def flip(file: Path, at: int = -2) -> Path:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)
    return file


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.usefixtures("ray_session")
def test_a_damaged_artifact_is_reported_and_the_next_run_recomputes_it(command, folder, tmp_path):
    store = tmp_path / "runs"
    sweep = write_sweep(tmp_path, "flipped", AIR.format(folder=folder))
    assert command("run", sweep, "--store", store, "--quiet")[0] == 0
    before = table(store, "flipped")
    artifacts = store / "artifacts"

    def last(pattern: str) -> Path:
        return sorted(artifacts.glob(pattern))[-1]

    def rows(stage: str, *path: str) -> Iterator[Path]:
        """Folders of image rows that were generated with a LoRA."""
        for file in artifacts.glob(f"{stage}/*/*/row.json"):
            spec = json.loads(file.read_text())["spec"]
            for name in path:
                spec = spec[name]
            if spec is not None:
                yield file.parent

    # A run reads features and a LoRA only if something is missing, so remove the trial of air_fpl
    # and one block of images. The images of another block are read to be encoded again.
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
        flip(last("features/*/*/features.safetensors")),
        flip(last("labels/*/*/labels.safetensors")),
        flip(last("lora/*/*/record.json")),
        flip(last("trials/*/*/predictions.safetensors")),
        flip(features / "0002-00000.safetensors"),
        flip(images / "0001-00000.parquet"),
    ]
    code, _, err = command("table", "flipped", "--store", store)
    assert code == 2
    assert "predictions.safetensors does not match its digest in the record" in err
    code, _, err = command("run", sweep, "--store", store)
    assert code == 0, err
    for file in damaged[:-1]:  # the worker that reads the last file generates it again
        artifact = file if file.parent == features else file.parent
        assert f"{artifact} was damaged" in err
        assert list(artifact.parent.glob(f".damaged-{artifact.name}-*"))
    assert list(images.glob(".damaged-0001-00000.parquet-*"))
    assert table(store, "flipped") == before
    again = command("run", sweep, "--store", store)
    assert "nothing to do" in again[2]


# ---------------------------------------------------------------- datasets that change


@pytest.fixture
def folder(drawn_digits, tmp_path) -> Path:
    return Path(shutil.copytree(drawn_digits, tmp_path / "leaves"))


def rename(folder: Path) -> None:
    next(folder.rglob("*.png")).rename(folder / "digit zero" / "zzz.png")


def add(folder: Path) -> None:
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(folder / "digit zero" / "new.png")


def remove(folder: Path) -> None:
    next(folder.rglob("*.png")).unlink()


def move_away(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.usefixtures("ray_session")
def test_finished_results_do_not_change_with_the_folder_until_the_sweep_runs_again(
    command, folder, tmp_path, caplog
):
    store, copy = tmp_path / "runs", tmp_path / "copied"
    sweep = write_sweep(tmp_path, "own", OWN.format(folder=folder))
    assert command("run", sweep, "--store", store, "--quiet")[0] == 0
    before = table(store, "own")
    files = {file for file in (store / "artifacts").rglob("*") if file.is_file()}
    original = Path(shutil.copytree(folder, tmp_path / "original"))
    shutil.copytree(store, copy)
    for change in (rename, add, remove, move_away):
        change(folder)
        assert table(store, "own") == before
        assert table(copy, "own") == before
        noted = command("table", "own", "--store", store)[2]
        assert f"note: folder:{folder} has changed since this run: `airsweep run" in noted
        if change is move_away:  # it reads no image
            words = ("export", "best", "--sweep", "own", "--only", "method=fpl")
            code, _, err = command(*words, "-o", tmp_path / "b", "--store", store)
            assert code == 0, err
        assert command("cache", "gc", "--yes", "--store", store)[0] == 0
        assert {file for file in (store / "artifacts").rglob("*") if file.is_file()} == files
        planned = command("plan", sweep, "--store", store)
        if change is move_away:
            assert (planned[0], str(folder) in planned[2]) == (2, True)
        else:
            assert planned[0] == 0
            words = "the folder changed since: 3 results are of the earlier content"
            assert f"folder:{folder}: {words}" in planned[1]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
    assert "0 to run" in command("plan", sweep, "--store", store)[1]

    ledger = flip(store / "sweeps/default/own/ledger.json", at=40)
    code, _, err = command("table", "own", "--store", store)
    assert code == 2
    assert f"{ledger} is damaged" in err
    caches = [flip(store / name, at=40) for name in ("history.json", "digests.json")]
    assert command("run", sweep, "--store", store)[0] == 0  # there is nothing to do
    assert all(f"{file} is damaged and is computed again" in caplog.text for file in caches)
    assert table(store, "own") == before

    remove(folder)
    code, _, err = command("run", sweep, "--store", store)
    assert code == 0
    assert "the folder changed since: 3 results are of the earlier content" in err
    assert table(store, "own") != before
    assert len(list((store / "artifacts").glob("features/*/*/record.json"))) == 2


def test_a_dataset_that_changes_after_the_plan_is_an_error(folder, tmp_path):
    def features() -> FeaturesSpec:
        resolver = Resolver(tmp_path / "digests.json", None)
        return FeaturesSpec(
            dataset=resolver.dataset_by_name(f"folder:{folder}").ref,
            backbone=resolver.weights("backbone", "tiny"),
        )

    def records() -> list[Path]:
        return [*(store.artifacts / "features").rglob("record.json")]

    store = ArtifactStore(tmp_path / "runs")
    worker, planned = WorkerContext(store), features()
    for classes in folder.iterdir():  # ten files
        next(classes.iterdir()).unlink()
    with pytest.raises(ChangedInput, match="has changed since the run was planned"):
        build_features(planned, worker)
    # Also while the images are read: the callback runs after the last image.
    with pytest.raises(ChangedInput):
        build_features(features(), worker, lambda done, total: add(folder))
    assert records() == []
    planned = features()
    build_features(planned, worker)
    assert len(records()) == 1
    # Of many images, some are read, and only their files are checked.
    file = worker.examples(planned.dataset).images.files[1]
    file.write_bytes(file.read_bytes() + b" ")
    assert [image.mode for image in worker.images(planned.dataset, [0])] == ["RGB"]
    with pytest.raises(ChangedInput, match="has changed since the run was planned"):
        worker.images(planned.dataset, [0, 1])


def test_a_folder_of_synthetic_images_that_changes_after_the_plan_is_an_error(folder, tmp_path):
    def row() -> FolderImages:
        resolver = Resolver(tmp_path / "digests.json", None)
        model = resolver.weights("generator", f"folder:{folder}")
        return FolderImages(model=model, classnames=CLASSES, size=8, block=2)

    worker = WorkerContext(ArtifactStore(tmp_path / "runs"))
    planned = row()
    first = min((folder / CLASSES[0]).iterdir())
    first.rename(first.with_name("zzz.png"))
    with pytest.raises(ChangedInput, match="has changed since the run was planned"):
        planned.open(worker)
    generator = row().open(worker)
    assert generator.generate(CLASSES[0], [0, 1], [0, 0]).shape == (2, 8, 8, 3)
