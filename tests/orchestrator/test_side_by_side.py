"""Trials side by side, on the real digits: each has the record and the failure of one alone."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air_core import method
from air_core.normal import normalised
from air_core.specs import TrialSpec
from orchestrator.replicas import run_trials, side_by_side
from orchestrator.stages import build_features
from orchestrator.store import ArtifactStore, MissingArtifact
from orchestrator.trial import TrialRecord, run_trial
from orchestrator.workshop import Workshop

QUICK = {"train__steps": 4, "prompt__length": 2}


@pytest.fixture(scope="module")
def features(tmp_path_factory, trial) -> Path:
    """A store that holds the features of the digits and nothing else."""
    store = ArtifactStore(tmp_path_factory.mktemp("replicas") / "runs")
    build_features(trial("fpl").features, Workshop(store))
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


def test_seeds_side_by_side_leave_the_records_of_seeds_alone(seeds, store, features, tmp_path):
    told: dict[int, list[float]] = {0: [], 1: [], 2: []}
    started = time.monotonic()
    together = run_trials(seeds, store, share_done=lambda place, share: told[place].append(share))
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
    # Each is charged for its share, so that hours add up to what was paid.
    assert sum(record.seconds for record in together) <= took
    assert sum(record.metrics["time/train_s"] for record in together) <= took
    assert all(shares == sorted(shares) and shares[-1] == 1 for shares in told.values())


def test_each_fails_alone_and_only_what_is_missing_runs_again(trial, seeds, store):
    nan = replace(seeds[1], train=replace(seeds[1].train, learning_rate=1e38))
    undrawn = trial("air_fpl", images_per_class=4, seed=3, synthetic_weight=0.5, **QUICK)
    first, second, third, fourth = run_trials([seeds[0], nan, undrawn, seeds[0]], store)
    assert isinstance(first, TrialRecord)
    assert first == fourth
    assert isinstance(second, FloatingPointError)
    assert isinstance(third, MissingArtifact)
    assert staged(store) == []
    made = (first.path / "record.json").stat().st_mtime_ns
    again = run_trials([seeds[0], seeds[2]], store)
    assert (first.path / "record.json").stat().st_mtime_ns == made
    assert "replicas" not in info(again[1])  # it was the only one that was missing
    assert isinstance(run_trials([seeds[1]], store.read_only())[0], MissingArtifact)


def test_too_many_for_the_memory_run_one_by_one(seeds, store, monkeypatch):
    fit, sizes = method.fit, []

    def small_machine(trainings: Any) -> Any:
        sizes.append(len(trainings))
        if len(trainings) > 1:
            raise MemoryError("out of memory")
        return fit(trainings)

    monkeypatch.setattr(method, "fit", small_machine)
    assert all(isinstance(one, TrialRecord) for one in run_trials(seeds, store))
    assert sizes == [3, 1, 1, 1]


def test_prompts_before_the_same_names_go_together_as_far_as_memory_allows(trial):
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
