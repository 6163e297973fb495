"""A sweep's outcomes, from small real trials; and that no true label leaks into them."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from air_core.datasets import get_dataset
from air_core.specs import FeaturesSpec
from orchestrator.planning import Plan
from orchestrator.planning.plan import plan_sweep
from orchestrator.reporting import results_of, standing
from orchestrator.reporting.results import (
    CURVES,
    Standing,
    curves_frame,
    entries_of,
    flat_of,
    settings_of,
    trials_frame,
)
from orchestrator.reporting.tables import rows_frame
from orchestrator.spec import Dimension, SweepSpec, cells_of
from orchestrator.spec.space import study_name
from orchestrator.spec.sweep import Search, Seeds
from orchestrator.stages.build import PARTS
from orchestrator.stages.trial import run_trial
from orchestrator.store import ArtifactStore, EventLog, TrialRecord, read_trial

IMAGES = 200  # of the digits
QUICK = {"train.steps": 2, "prompt.length": 2, "iterations": 2}
TWO = Seeds(values=((1,), (2,)))


@pytest.fixture(scope="module")
def arrays(tiny_clip) -> dict[str, np.ndarray]:
    """Features of some digits, with fixed parts: a split must not depend on labels here."""
    examples = get_dataset("digits").load(None)
    parts = np.tile([PARTS.index(part) for part in ("train", "val", "test", "train")], IMAGES // 4)
    return {
        "features": tiny_clip.encode_images(examples.images[:IMAGES]).numpy(),
        "labels": examples.labels[:IMAGES],
        "parts": parts.astype(np.int8),
    }


def store_with(root: Path, spec: FeaturesSpec, arrays: dict[str, np.ndarray]) -> ArtifactStore:
    store = ArtifactStore(root)

    def build(folder: Path) -> dict[str, Any]:
        save_file(arrays, folder / "features.safetensors")
        return {}

    store.get_or_build(spec, build)
    return store


@pytest.fixture
def features(resolver) -> FeaturesSpec:
    spec: FeaturesSpec = resolver.trial({"images_per_class": 0}).features
    return spec


@pytest.fixture
def store(tmp_path, features, arrays) -> ArtifactStore:
    return store_with(tmp_path / "runs", features, arrays)


@pytest.fixture
def event_log(tmp_path) -> EventLog:
    event_log = EventLog(tmp_path / "sweep")
    event_log.folder.mkdir()
    return event_log


# ---------------------------------------------------------------- entries


def planned(sweep: SweepSpec, store: ArtifactStore, resolver: Any, event_log: EventLog) -> Plan:
    return plan_sweep(sweep, store, resolver, event_log)


def test_every_trial_that_has_a_record_is_an_entry(store, resolver, event_log):
    sweep = SweepSpec(
        name="x", grid={"method": ("zero_shot", "fpl")}, fixed={"train.steps": 2}, seeds=TWO
    )
    plan = planned(sweep, store, resolver, event_log)
    assert entries_of(plan, store) == []
    records = [run_trial(slot.spec, store) for slot in plan.slots[:3]]
    entries = entries_of(plan, store)
    assert [(e.method, e.point, e.seed) for e in entries] == [
        *(("zero_shot", 0, 0), ("zero_shot", 0, 0)),  # it has no seed
        ("fpl", 0, 1),
    ]
    for entry, record in zip(entries, records, strict=True):
        image_ids, predictions, labels = record.predictions()
        assert entry.metrics == record.metrics
        assert np.array_equal(entry.image_ids, image_ids)
        assert (entry.predictions == entry.labels).mean() == record.metrics["test/accuracy"]
        assert np.array_equal(predictions, entry.predictions)
        assert np.array_equal(labels, entry.labels)
        assert entry.objective is None  # nothing is searched


def test_an_entry_says_what_the_sweep_varies_and_all_its_settings(store, resolver, event_log):
    sweep = SweepSpec(
        name="x",
        grid={"method": ("fpl", "cpl"), "prompt.length": (2, 4)},
        fixed={"train.steps": 2},
        seeds=Seeds(values=((1, 7),), vary=("seed", "split_seed")),
    )
    plan = planned(sweep, store, resolver, event_log)
    assert [settings_of(slot) for slot in plan.slots] == 2 * [
        {"prompt.length": 2},
        {"prompt.length": 4},
    ]
    flat = flat_of(plan.slots[1])
    assert (flat["prompt.length"], flat["train.steps"]) == (4, 2)
    assert (flat["seed"], flat["split_seed"]) == (1, 7)
    assert flat["iterations"] == 1  # the method's


def test_a_points_objective_is_the_mean_over_its_runs(store, resolver, event_log):
    lengths = Dimension(key="prompt.length", values=(1, 3))
    fixed = {"method": "fpl", "train.steps": 2}
    search = Search(sampler="random", points=3, width=2, space=(lengths,))
    sweep = SweepSpec(name="x", fixed=fixed, search=search, seeds=TWO)
    (cell,) = cells_of(sweep)
    for number, length in enumerate((3, 1)):
        asked = {"point": number, "params": {"prompt.length": length}}
        event_log.append("point_asked", cell=cell.id, study=study_name(cell, search), **asked)
    plan = planned(sweep, store, resolver, event_log)
    for slot in plan.slots:
        run_trial(slot.spec, store)
    entries = entries_of(plan, store)
    assert [(e.point, e.settings) for e in entries] == [
        *((0, {"prompt.length": 3}), (0, {"prompt.length": 3})),
        *((1, {"prompt.length": 1}), (1, {"prompt.length": 1})),
    ]
    for number in (0, 1):
        found = [
            read_trial(slot.spec, store).objectives["mutual_information"]
            for slot in plan.slots
            if slot.point == number
        ]
        means = [e.objective for e in entries if e.point == number]
        assert means == [pytest.approx(sum(found) / 2)] * 2
    assert entries[0].objective != entries[2].objective


LOOKING = """
import sys
from orchestrator.reporting import (charts, html_report, published, results, summary, tables)
print(*sorted({"torch", "ray", "mlflow", "optuna", "sklearn"} & set(sys.modules)))
"""


def test_looking_at_results_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", LOOKING],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == []


# ---------------------------------------------------------------- no leak


def relabelled(arrays: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """The labels of one part in another order."""
    index = np.flatnonzero(arrays["parts"] == PARTS.index(part))
    labels = arrays["labels"].copy()
    labels[index] = labels[np.random.default_rng(0).permutation(index)]
    return {**arrays, "labels": labels}


@pytest.mark.parametrize("method", ["zero_shot", "fpl", "grip", "cpl", "cpl_real"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_true_labels_change_how_a_trial_is_marked_and_nothing_else(
    tmp_path, resolver, features, arrays, method, part
):
    """From the store on: the same features, but the true labels of pool or test shuffled."""
    sweep = SweepSpec(name="x", fixed={"method": method, "train.steps": 2}, seeds=TWO)
    spec = resolver.trial({**cells_of(sweep)[0].flat, "seed": 1})
    spec = replace(spec, prompt=replace(spec.prompt, length=2), iterations=min(2, spec.iterations))
    stores = [
        store_with(tmp_path / "true", features, arrays),
        store_with(tmp_path / "shuffled", features, relabelled(arrays, part)),
    ]
    one, other = (run_trial(spec, store) for store in stores)
    assert one.objectives == other.objectives
    assert np.array_equal(one.predictions()[1], other.predictions()[1])
    assert one.curves.get("train/loss") == other.curves.get("train/loss")
    assert (
        changed(one, other)
        == {
            "train": {"pseudo/accuracy", "pool/accuracy_fused"},
            "test": {name for name in one.metrics if name.startswith("test/")},
        }[part]
    )


def changed(one: TrialRecord, other: TrialRecord) -> set[str]:
    assert one.metrics.keys() == other.metrics.keys()
    timeless = one.metrics.keys() - {"time/train_s"}
    return {name for name in timeless if one.metrics[name] != other.metrics[name]}


def test_a_trial_is_the_same_bits_in_another_store(tmp_path, resolver, store, features, arrays):
    spec = resolver.trial({"images_per_class": 0, **QUICK, "seed": 3})
    copy = ArtifactStore(Path(shutil.copytree(store.root, tmp_path / "copy")))
    one, other = run_trial(spec, store), run_trial(spec, copy)
    assert changed(one, other) == set()
    assert one.curves == other.curves
    files = [record.path / "predictions.safetensors" for record in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert set(load_file(files[0])) == {"index", "predictions", "labels"}


# ---------------------------------------------------------------- frames

SWEEP = SweepSpec(
    name="x",
    grid={"method": ("zero_shot", "cpl"), "prompt.length": (2, 4)},
    fixed={"train.steps": 2, "iterations": 2},
    seeds=Seeds(values=((1,), (2,))),
)


@pytest.fixture
def plan(store, resolver, event_log):
    """Of six trials three have run, one of them in another sweep, and one has failed."""
    plan = plan_sweep(SWEEP, store, resolver, event_log)
    slots = plan.slots
    for slot in (slots[0], slots[2], slots[3]):
        run_trial(slot.spec, store)
    event_log.append("sweep_started", total=plan.total)
    for slot in (slots[0], slots[2]):
        event_log.append("trial_done", slot=slot.id, key=slot.key.digest, cell=slot.cell.id)
    why = {"failure_class": "oom", "message": "out of memory"}
    event_log.append("trial_failed", slot=slots[4].id, **why)
    event_log.append("trials_started", slots=[slots[5].id])  # by a driver that is gone
    return plan


def test_a_line_for_each_trial_with_what_varies_its_state_and_its_metrics(plan, store, event_log):
    frame = trials_frame(plan, store, event_log)
    states = ["done", "reused", "done", "reused", "failed", "waiting"]
    assert frame["state"].tolist() == states
    assert frame["trial"].tolist() == [slot.id for slot in plan.slots]
    assert frame["method"].tolist() == ["zero_shot"] * 2 + ["cpl"] * 4
    assert frame["seed"].tolist() == [1, 2] * 3
    assert frame["prompt.length"].tolist()[2:] == [2, 2, 4, 4]
    assert math.isnan(frame["prompt.length"][0])  # zero-shot learns no prompt
    assert frame["failure"].tolist() == ["", "", "", "", "oom", ""]
    assert frame["message"][4] == "out of memory"
    for slot, accuracy in zip(plan.slots[:4], frame["test/accuracy"], strict=False):
        assert accuracy == run_trial(slot.spec, store).metrics["test/accuracy"]
    assert frame["test/accuracy"].isna().tolist() == [False] * 4 + [True] * 2


def test_curves_are_long_and_go_with_the_trials(plan, store):
    frame = curves_frame(plan, store)
    assert tuple(frame.columns) == CURVES
    found = frame.groupby(["trial", "metric"])["value"].apply(list)
    for slot in plan.slots[2:4]:
        for metric, values in run_trial(slot.spec, store).curves.items():
            assert found[slot.id, metric] == values
    assert set(frame["trial"]) == {slot.id for slot in plan.slots[2:4]}  # zero-shot has none
    assert sorted(set(frame["iteration"])) == [0, 1]


def test_rows_have_settings_as_columns(plan, store):
    found = results_of(plan, store).rows
    frame = rows_frame(found)
    assert frame["method"].tolist() == ["zero_shot", "cpl"]
    assert frame["prompt.length"].tolist()[1] == 2
    assert frame["mean"].tolist() == [row.mean for row in found]
    assert "settings" not in frame.columns


def test_frames_of_a_sweep_without_a_trial_have_their_columns(store, resolver, tmp_path):
    empty = EventLog(tmp_path / "empty")
    plan = plan_sweep(SWEEP, store, resolver, empty)
    assert trials_frame(plan, store, empty)["state"].tolist() == ["waiting"] * 6
    assert tuple(curves_frame(plan, store).columns) == CURVES
    assert {"dataset", "method", "mean", "interval"} <= set(rows_frame([]).columns)


# ---------------------------------------------------------------- how a sweep stands


def test_a_sweep_that_never_started_has_nothing(event_log):
    assert standing(event_log) == Standing()


def slots(*numbers: int) -> list[str]:
    return [f"cell/0/seed={number}" for number in numbers]


@pytest.fixture
def started(event_log) -> EventLog:
    """Five trials, of which one is done, one reused, one failed and one runs."""
    event_log.append("sweep_started", spec="s", total=5, to_run=5, pid=1)
    event_log.append("artifact_prepared", stage="features", key="k")
    event_log.append("trials_started", slots=slots(1, 2, 3, 4))
    one, two, three, _ = slots(1, 2, 3, 4)
    event_log.append("trial_done", slot=one, cell="cell", key="a")
    event_log.append("trial_reused", slot=two, cell="cell", key="a")
    failure = {"failure_class": "nan", "message": "the loss became nan"}
    event_log.append("trial_failed", slot=three, cell="cell", key="b", **failure)
    return event_log


def test_trials_are_counted_by_what_became_of_them(started):
    found = standing(started)
    states = {"done": 1, "reused": 1, "pruned": 0, "failed": 1}
    assert found.counts(alive=True) == {**states, "running": 1, "waiting": 1}
    assert found.exit_code is None
    assert dict(found.prepared) == {"features": 1}
    assert found.failures[slots(3)[0]]["message"] == "the loss became nan"


def test_what_a_dead_driver_was_running_waits_again(started):
    assert standing(started).counts(alive=False)["running"] == 0
    assert standing(started).counts(alive=False)["waiting"] == 2


def test_what_an_edited_file_no_longer_asks_for_is_not_counted(started):
    found = standing(started).counts(alive=False, among=set(slots(2, 3)))
    assert (found["done"], found["reused"], found["failed"]) == (0, 1, 1)


def test_a_trial_that_failed_and_then_went_well_is_no_failure(started):
    started.append("trials_started", slots=slots(3))
    started.append("trial_done", slot=slots(3)[0], cell="cell", key="b")
    assert standing(started).counts(alive=True)["failed"] == 0
    assert standing(started).failures == {}


def test_a_sweep_has_ended_until_it_is_started_again(started):
    started.append("sweep_ended", exit_code=1, seconds=3.0)
    assert standing(started).exit_code == 1
    started.append("sweep_started", spec="s", total=7, to_run=3, pid=2)
    assert standing(started).exit_code is None
    assert standing(started).total == 7
    assert standing(started).counts(alive=True)["done"] == 1
