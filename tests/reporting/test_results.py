"""Results and status of a sweep from small real trials; true labels do not leak."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.planning.plan import plan_sweep
from orchestrator.reporting import results_of
from orchestrator.reporting.results import CURVES, curves_frame, trials_frame
from orchestrator.spec import Dimension, SweepSpec, cells_of
from orchestrator.spec.space import study_name
from orchestrator.spec.sweep import Search, Seeds
from orchestrator.stages import FeaturesSpec
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore, EventLog, TrialRecord, read_trial
from tests.helpers.features import digit_features, relabelled, store_with

IMAGES = 200  # of the digits
QUICK = {"train.steps": 2, "prompt.length": 2, "iterations": 2}
TWO = Seeds(values=((1,), (2,)))


@pytest.fixture(scope="module")
def arrays(tiny_clip) -> dict[str, np.ndarray]:
    return digit_features(tiny_clip.encode_images, IMAGES, ("train", "val", "test", "train"))


@pytest.fixture
def features(resolver) -> FeaturesSpec:
    spec: FeaturesSpec = resolver.trial({"precision": "fp32", "images_per_class": 0}).features
    return spec


@pytest.fixture
def store(tmp_path, features, arrays) -> ArtifactStore:
    return store_with(tmp_path / "runs", features, arrays)


@pytest.fixture
def event_log(tmp_path) -> EventLog:
    event_log = EventLog(tmp_path / "sweep")
    event_log.folder.mkdir()
    return event_log


# ---------------------------------------------------------------- finished trials


def test_every_trial_with_a_record_is_finished(store, resolver, event_log):
    sweep = SweepSpec(
        name="x", grid={"method": ("zero_shot", "fpl")}, fixed={"train.steps": 2}, seeds=TWO
    )
    plan = plan_sweep(sweep, store, resolver, event_log)
    assert results_of(plan, store).trials == []
    records = [run_trial(slot.spec, store) for slot in plan.slots[:3]]
    trials = results_of(plan_sweep(sweep, store, resolver, event_log), store).trials
    assert [(t.method, t.point, t.seed) for t in trials] == [
        *(("zero_shot", 0, None), ("zero_shot", 0, None)),  # it ignores the seed
        ("fpl", 0, 1),
    ]
    for trial, record in zip(trials, records, strict=True):
        image_ids, predictions, labels = record.predictions()
        assert trial.metrics == record.metrics
        assert np.array_equal(trial.image_ids, image_ids)
        assert (trial.predictions == trial.labels).mean() == record.metrics["test/accuracy"]
        assert np.array_equal(predictions, trial.predictions)
        assert np.array_equal(labels, trial.labels)
        assert trial.objective is None  # without a search


def test_runs_can_differ_in_their_seen_classes(store, resolver, event_log):
    seeds = Seeds(values=((1, 500), (1, 0), (1, 200)), vary=("seed", "class_seed"))
    sweep = SweepSpec(
        name="x", grid={"paradigm": ("ul", "trzsl")}, fixed={"method": "zero_shot"}, seeds=seeds
    )
    plan = plan_sweep(sweep, store, resolver, event_log)
    for slot in plan.slots:
        run_trial(slot.spec, store)
    ul, trzsl = results_of(plan_sweep(sweep, store, resolver, event_log), store).rows
    assert (ul.n, trzsl.n) == (1, 3)  # a trial without unseen classes ignores the seed
    assert trzsl.protocol["class_seed"] is None


def test_a_points_objective_is_the_mean_over_its_runs(store, resolver, event_log):
    lengths = Dimension(key="prompt.length", values=(1, 3))
    fixed = {"method": "fpl", "train.steps": 2}
    search = Search(sampler="random", points=3, width=2, space=(lengths,))
    sweep = SweepSpec(name="x", fixed=fixed, search=search, seeds=TWO)
    (cell,) = cells_of(sweep)
    for number, length in enumerate((3, 1)):
        point = {"point": number, "params": {"prompt.length": length}}
        event_log.append("point_asked", cell=cell.id, study=study_name(cell, search), **point)
    plan = plan_sweep(sweep, store, resolver, event_log)
    for slot in plan.slots:
        run_trial(slot.spec, store)
    trials = results_of(plan_sweep(sweep, store, resolver, event_log), store).trials
    assert [(t.point, t.settings) for t in trials] == [
        *((0, {"prompt.length": 3}), (0, {"prompt.length": 3})),
        *((1, {"prompt.length": 1}), (1, {"prompt.length": 1})),
    ]
    for number in (0, 1):
        found = [
            read_trial(slot.spec, store).objectives["mutual_information"]
            for slot in plan.slots
            if slot.point == number
        ]
        means = [t.objective for t in trials if t.point == number]
        assert means == [pytest.approx(sum(found) / 2)] * 2
    assert trials[0].objective != trials[2].objective


# ---------------------------------------------------------------- no label leaks


@pytest.mark.parametrize("method", ["zero_shot", "cpl_real"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_true_labels_change_the_metrics_of_a_trial_but_not_its_predictions(
    tmp_path, resolver, features, arrays, method, part
):
    """Run on equal features, once with permuted labels of the pool or of the test images."""
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
    tested = {name for name in one.metrics if name.startswith("test/")}
    measured = {"train": {"pseudo/accuracy", "pool/accuracy_fused"}, "test": tested}
    assert changed(one, other) == measured[part]


def changed(one: TrialRecord, other: TrialRecord) -> set[str]:
    """Metrics that differ, except the time."""
    assert one.metrics.keys() == other.metrics.keys()
    timeless = one.metrics.keys() - {"time/train_s"}
    return {name for name in timeless if one.metrics[name] != other.metrics[name]}


# ---------------------------------------------------------------- frames

SWEEP = SweepSpec(
    name="x",
    grid={"method": ("zero_shot", "cpl"), "prompt.length": (2, 4)},
    fixed={"train.steps": 2, "iterations": 2},
    seeds=Seeds(values=((1,), (2,))),
)


@pytest.fixture
def plan(store, resolver, event_log):
    """Six trials: three have records, one of them from another sweep, and one has failed."""
    plan = plan_sweep(SWEEP, store, resolver, event_log)
    slots = plan.slots
    for slot in (slots[0], slots[2], slots[3]):
        run_trial(slot.spec, store)
    event_log.append("sweep_started", total=plan.total)
    for slot in (slots[0], slots[2]):
        event_log.append("trial_done", slot=slot.id, key=slot.key.digest, cell=slot.cell.id)
    failure = {"failure_class": "oom", "message": "out of memory"}
    event_log.append("trial_failed", slot=slots[4].id, key=slots[4].key.digest, **failure)
    event_log.append("trials_started", slots=[slots[5].id])  # by a driver that was killed
    return plan_sweep(SWEEP, store, resolver, event_log)


def test_trials_frame_has_settings_state_and_metrics_of_each_trial(plan, store, event_log):
    frame = trials_frame(plan, store)
    states = ["done", "shared", "done", "reused", "failed", "waiting"]
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


def test_curves_frame_has_one_line_per_value(plan, store):
    frame = curves_frame(plan, store)
    assert tuple(frame.columns) == CURVES
    found = frame.groupby(["trial", "metric"])["value"].apply(list)
    for slot in plan.slots[2:4]:
        for metric, values in run_trial(slot.spec, store).curves.items():
            assert found[slot.id, metric] == values
    assert set(frame["trial"]) == {slot.id for slot in plan.slots[2:4]}  # zero-shot has none
    assert sorted(set(frame["iteration"])) == [0, 1]
