"""Images without class folders, from `init` to the table: without labels, then with some."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from air_core.datasets import get_dataset
from orchestrator import api
from orchestrator.planning import plan_of, read_request
from orchestrator.reporting.comparisons import Results
from orchestrator.reporting.results import results_of
from orchestrator.reporting.tables import table
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore, SweepLocation
from tests.helpers.sweeps import airsweep

CLASSES = "zero,one,seven"
TRUE = {}  # class by path


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """36 digits of three classes in folders that mean nothing."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "photos"
    (home / "trip").mkdir(parents=True)
    digits = get_dataset("digits").load(None)
    for label, name in ((0, "zero"), (1, "one"), (7, "seven")):
        for i in np.flatnonzero(digits.labels == label)[:12]:
            path = f"trip/{i:04}.png" if i % 2 else f"{i:04}.png"
            digits.images[i].save(home / path)
            TRUE[path] = name
    return home


def label(home: Path, each: int, part: str = "test") -> None:
    """Label the first images of each class."""
    lines = [
        (path, name, part)
        for name in CLASSES.split(",")
        for path in sorted(p for p in TRUE if TRUE[p] == name)[:each]
    ]
    with (home / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "class", "part"), *lines])


def finished(folder: Path, modality: str = "text") -> tuple[Results, list[dict[str, float]]]:
    """Run the trials of `mine.yaml` that need no images; results and metrics."""
    sets = ["iterations=1", "train.steps=2", "seeds=[1]", f"modality={modality}"]
    sweep = read_request("mine.yaml", sets, ["method=zero_shot,cpl"]).spec
    store = ArtifactStore(folder / "runs")
    location = SweepLocation(store, "default", "mine", None)
    plan = plan_of(sweep, location)
    for spec in {spec for slot in plan.slots for spec in (slot.spec.features, slot.spec.tokens)}:
        if spec is not None:
            build_features(spec, WorkerContext(store))
    records = [run_trial(slot.spec, store) for slot in plan.slots]
    return results_of(plan_of(sweep, location), store), [record.metrics for record in records]


@pytest.mark.parametrize("modality", ["text", "visual"])
def test_what_needs_labels_is_absent_without_them_and_nothing_is_called_accuracy(
    photos, tmp_path, modality
):
    api.init("mine", "photos", classes=CLASSES)
    results, metrics = finished(tmp_path, modality)
    for of_trial in metrics:
        assert not [name for name in of_trial if "accuracy" in name]
        assert of_trial["objective/mutual_information_text"] > 0
        assert of_trial["pseudo/coverage"] > 0
        assert np.isfinite([*of_trial.values()]).all()
    assert not results.tested
    assert not results.comparisons
    for row in json.loads(table(results, "json")):
        assert (row["mean"], row["metric"], row["n_test"], row["text"]) == (None, None, 0, None)
        assert row["mutual_information"]["text"] > 0
    shown = " ".join(table(results, "md").split())
    assert "No image is labelled for test, so no accuracy" in shown
    assert "| accuracy" not in shown
    assert "information text" in shown
    assert "nan" not in table(results, "csv").lower()
    assert results.best_classifiers[results.tasks[0]].row.method == "cpl"


def test_labelled_images_measure_accuracy_and_the_pool_stays_without_labels(photos, tmp_path):
    label(photos, 4)
    api.init("mine", "photos", classes=CLASSES)
    results, metrics = finished(tmp_path)
    for row, of_trial in zip(results.rows, metrics, strict=True):
        assert row.n_test == 12
        assert row.mean == of_trial["test/accuracy"]
        assert not [name for name in of_trial if name.startswith("pool/accuracy")]
        assert "pseudo/accuracy" not in of_trial
        assert "objective/validation_accuracy" not in of_trial
    assert re.search(r"\| +accuracy \|", table(results, "md"))

    label(photos, 4, "val")
    results, metrics = finished(tmp_path)
    assert not results.tested
    assert all(0 <= of_trial["objective/validation_accuracy"] <= 1 for of_trial in metrics)
    assert {of_trial["validation/images"] for of_trial in metrics} == {12}


@pytest.mark.integration
@pytest.mark.ray
def test_unlabelled_images_run_from_init_to_the_report(photos, ray_session):
    airsweep("init", "mine", "--images", "photos", "--classes", CLASSES)
    words = ("run", "mine.yaml", "--smoke", "--only", "method=zero_shot,air")
    screen = airsweep(*words)
    assert "No image is labelled for test" in " ".join(screen.stdout.split())
    assert "accuracy  " not in screen.stdout
    assert "Warning" not in screen.stderr
    rows = json.loads(airsweep("table", "mine", "--store", "runs-smoke", "--format", "json").stdout)
    assert [(row["method"], row["n_test"], row["mean"]) for row in rows] == [
        ("zero_shot", 0, None),
        ("air", 0, None),
    ]
    assert 0 <= rows[1]["agreement"] <= 1
    assert set(rows[1]["mutual_information"]) == {"text", "auxiliary", "fused"}
    # The history has the time per step and per block, and separately the start-up time.
    history = json.loads(Path("runs-smoke/history.json").read_text())
    for stage in ("lora", "images"):
        [pace] = [each for name, each in history.items() if name.startswith(f"{stage}: ")]
        assert min(pace) > 0
    airsweep("report", "mine", "--store", "runs-smoke", "-o", "report.html")
    assert "; 36 images, of " in Path("report.html").read_text()
