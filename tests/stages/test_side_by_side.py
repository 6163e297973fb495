"""Trials side by side, on the real digits: each has the same record or failure as alone."""

from __future__ import annotations

import json
import shutil
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air_core import side_by_side as core
from air_core.specs import TrialSpec
from air_core.specs.normal import normalised
from orchestrator.errors import MissingArtifact
from orchestrator.planning.resources import side_by_side
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.stages.side_by_side import run_trials
from orchestrator.stages.trial import run_trial
from orchestrator.store import ArtifactStore, TrialRecord
from orchestrator.store.checkpoints import (
    START,
    Segments,
    read_checkpoint,
    recorded_rungs,
    write_checkpoint,
)

QUICK = {"train__steps": 4, "prompt__length": 2}


@pytest.fixture(scope="module")
def features(tmp_path_factory, trial) -> Path:
    """A store with the features of the digits."""
    store = ArtifactStore(tmp_path_factory.mktemp("replicas") / "runs")
    build_features(trial("fpl").features, WorkerContext(store))
    return store.root


@pytest.fixture
def store(features, tmp_path) -> ArtifactStore:
    return ArtifactStore(Path(shutil.copytree(features, tmp_path / "runs")))


@pytest.fixture
def seeds(trial) -> list[TrialSpec]:
    return [trial("fpl", seed=seed, **QUICK) for seed in (1, 2, 3)]


def info(record: TrialRecord) -> Any:
    return json.loads((record.path / "record.json").read_text())["info"]


def staged(store: ArtifactStore) -> list[Path]:
    return [path for path in (store.artifacts / "trials" / "v2").iterdir() if path.name[0] == "."]


def test_seeds_side_by_side_have_the_same_records_as_seeds_alone(seeds, store, features, tmp_path):
    progress: dict[int, list[float]] = {0: [], 1: [], 2: []}
    curves: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    started = time.monotonic()
    together = run_trials(
        seeds,
        WorkerContext(store),
        report=lambda index, done, total: progress[index].append(done / total),
        report_curves=lambda index, so_far: curves[index].append(deepcopy(so_far)),
    )
    took = time.monotonic() - started
    other = ArtifactStore(Path(shutil.copytree(features, tmp_path / "alone")))
    for ours, spec in zip(together, seeds, strict=True):
        assert isinstance(ours, TrialRecord)
        theirs = run_trial(spec, other)
        assert ours.key == theirs.key
        assert [p.name for p in sorted(ours.path.iterdir())] == [
            p.name for p in sorted(theirs.path.iterdir())
        ]
        assert ours.metrics.keys() == theirs.metrics.keys()
        assert ours.curves == {
            name: pytest.approx(of, rel=1e-4) for name, of in theirs.curves.items()
        }
        same = ours.predictions()[1] == theirs.predictions()[1]
        assert same.sum() >= len(same) - 1
        np.testing.assert_allclose(ours.prompt(), theirs.prompt(), rtol=1e-3, atol=1e-5)
        assert info(ours)["replicas"] == 3
        assert "replicas" not in info(theirs)
    # Each trial has its share of the time, so the sum is the time of the job.
    assert sum(record.seconds for record in together) <= took
    assert sum(record.metrics["time/train_s"] for record in together) <= took
    assert all(shares == sorted(shares) and shares[-1] == 1 for shares in progress.values())
    for index, record in enumerate(together):
        assert curves[index] == [
            {name: values[:rounds] for name, values in record.curves.items()}
            for rounds in range(1, seeds[0].iterations + 1)
        ]


def test_each_trial_fails_alone_and_only_missing_trials_run_again(trial, seeds, store):
    nan = replace(seeds[1], train=replace(seeds[1].train, learning_rate=1e38))
    undrawn = trial("air_fpl", images_per_class=4, seed=3, synthetic_weight=0.5, **QUICK)
    first, second, third, fourth = run_trials(
        [seeds[0], nan, undrawn, seeds[0]], WorkerContext(store)
    )
    assert isinstance(first, TrialRecord)
    assert first == fourth
    assert isinstance(second, FloatingPointError)
    assert isinstance(third, MissingArtifact)
    assert staged(store) == []
    written_at = (first.path / "record.json").stat().st_mtime_ns
    again = run_trials([seeds[0], seeds[2]], WorkerContext(store))
    assert (first.path / "record.json").stat().st_mtime_ns == written_at
    assert "replicas" not in info(again[1])  # it was the only missing trial
    assert isinstance(run_trials([seeds[1]], WorkerContext(store.read_only()))[0], MissingArtifact)


def test_too_many_for_the_memory_run_one_by_one(seeds, store, monkeypatch):
    fit, sizes = core.fit, []

    def small_machine(trainings: Any) -> Any:
        sizes.append(len(trainings))
        if len(trainings) > 1:
            raise MemoryError("out of memory")
        return fit(trainings)

    monkeypatch.setattr(core, "fit", small_machine)
    assert all(isinstance(one, TrialRecord) for one in run_trials(seeds, WorkerContext(store)))
    assert sizes == [3, 1, 1, 1]


def test_prompts_before_the_same_class_names_are_grouped_up_to_the_memory(trial):
    text = [normalised(trial("cpl", seed=seed)) for seed in range(30)]
    rate, longer, visual, zero = (
        normalised(trial("cpl", train__learning_rate=0.5)),
        normalised(trial("cpl", prompt__length=5)),
        normalised(trial("cpl", modality="visual")),
        normalised(trial("zero_shot")),
    )
    groups = side_by_side([visual, *text[:3], zero, longer, rate], "cpu")
    assert groups == [[visual], [*text[:3], rate], [zero], [longer]]
    # Ten classes each.
    assert [len(group) for group in side_by_side(text, "cpu")] == [25, 5]
    assert [len(group) for group in side_by_side(text, "cuda")] == [30]
    many = [replace(spec, classnames=tuple(map(str, range(1000)))) for spec in text[:3]]
    assert [len(group) for group in side_by_side(many, "cpu")] == [1, 1, 1]


# ---------------------------------------------------------------- segments

CLOCK = ("time/train_s",)


def without_clock(info: Any) -> Any:
    metrics = {name: value for name, value in info["metrics"].items() if name not in CLOCK}
    return {**info, "metrics": metrics, "rungs": None, "startup": None}


def test_a_trial_in_segments_has_the_same_record_as_one_without_stops(
    trial, store, features, tmp_path, monkeypatch
):
    fit, fits = core.fit, []
    monkeypatch.setattr(
        core, "fit", lambda trainings: fits.append(len(trainings)) or fit(trainings)
    )
    spec = trial("cpl", seed=1, **{**QUICK, "iterations": 4})
    rungs = (1, 3)
    assert run_trials([spec], WorkerContext(store), segments=Segments(rungs, stop_after=1)) == [
        None
    ]
    assert not store.has(spec)
    assert len(fits) == 1
    assert run_trials([spec], WorkerContext(store), segments=Segments(rungs, stop_after=1)) == [
        None
    ]  # it has a checkpoint
    assert len(fits) == 1
    assert run_trials([spec], WorkerContext(store), segments=Segments(rungs, stop_after=3)) == [
        None
    ]
    passed, seconds = recorded_rungs(spec, store)
    assert passed.keys() == {1, 3}
    assert seconds > 0
    assert len(fits) == 3
    [ours] = run_trials([spec], WorkerContext(store), segments=Segments(rungs))
    assert isinstance(ours, TrialRecord)
    assert len(fits) == 4  # as many as iterations
    assert ours.seconds > seconds
    assert 0 <= ours.startup < ours.seconds
    assert read_checkpoint(spec, store) is START
    assert recorded_rungs(spec, store)[0] == passed

    other = ArtifactStore(Path(shutil.copytree(features, tmp_path / "alone")))
    [theirs] = run_trials([spec], WorkerContext(other))
    assert isinstance(theirs, TrialRecord)
    assert "rungs" not in info(theirs)
    assert without_clock(info(ours)) == without_clock({**info(theirs), "rungs": None})
    for name in ("predictions.safetensors", "prompt.safetensors"):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes()


def test_a_checkpoint_of_an_earlier_version_with_dense_targets_is_read(trial, store, monkeypatch):
    spec = trial("cpl", seed=1, **{**QUICK, "iterations": 3})
    run_trials([spec], WorkerContext(store), segments=Segments((2,), stop_after=2))
    begun = read_checkpoint(spec, store)
    arrays = dict(begun.arrays)
    starts, classes, values = (arrays.pop(name) for name in ("starts", "classes", "values"))
    sizes = arrays.pop("sizes")
    arrays["targets"] = np.zeros((len(starts) - 1, sizes[0]), values.dtype)
    rows = np.arange(len(starts) - 1).repeat(np.diff(starts))
    arrays["targets"][rows, classes[:-1]] = values[:-1]
    assert arrays.keys() == {"prompts", "indices", "targets", "labels"}
    write_checkpoint(spec, store, replace(begun, arrays=arrays))
    fit, fits = core.fit, []
    monkeypatch.setattr(
        core, "fit", lambda trainings: fits.append(len(trainings)) or fit(trainings)
    )
    [record] = run_trials([spec], WorkerContext(store), segments=Segments((2,)))
    assert isinstance(record, TrialRecord)
    assert len(fits) == 1


def test_a_finished_trial_without_objectives_at_a_rung_runs_again_up_to_the_rung(
    trial, store, monkeypatch
):
    """Another sweep, without pruning, ran the trial."""
    spec = trial("cpl", seed=1, **{**QUICK, "iterations": 3})
    [record] = run_trials([spec], WorkerContext(store))
    fit, fits = core.fit, []
    monkeypatch.setattr(
        core, "fit", lambda trainings: fits.append(len(trainings)) or fit(trainings)
    )
    assert recorded_rungs(spec, store)[0] == {}
    run_trials([spec], WorkerContext(store), segments=Segments((1,), stop_after=1))
    assert recorded_rungs(spec, store)[0].keys() == {1}
    assert run_trials([spec], WorkerContext(store), segments=Segments((1,))) == [record]
    assert len(fits) == 1


def test_the_objective_at_a_rung_is_that_of_a_trial_that_ends_there(trial, store):
    """Pseudo-labels of fixed growth do not depend on the number of later iterations."""
    settings = {**QUICK, "pseudo_labels__growth": "fixed"}
    spec = trial("cpl", seed=1, **{**settings, "iterations": 3})
    run_trials([spec], WorkerContext(store), segments=Segments((2,), stop_after=2))
    short = run_trial(trial("cpl", seed=1, **{**settings, "iterations": 2}), store)
    assert recorded_rungs(spec, store)[0][2] == short.objectives


def test_seeds_resume_side_by_side_each_from_its_checkpoint(seeds, store):
    trials = [replace(spec, iterations=3) for spec in seeds]
    run_trials(trials[:2], WorkerContext(store), segments=Segments((2,), stop_after=2))
    run_trials(trials, WorkerContext(store), segments=Segments((2,), stop_after=2))
    records = run_trials(trials, WorkerContext(store), segments=Segments((2,)))
    for record in records:
        assert isinstance(record, TrialRecord)
        assert len(record.curves["train/loss"]) == 3
        assert info(record)["replicas"] == 3
