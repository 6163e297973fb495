"""Trials side by side, on the real digits: each has the same record or failure as alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air_core import side_by_side as core
from air_core.settings.normal import normalised
from orchestrator.errors import MissingArtifact
from orchestrator.stages import TrialSpec
from orchestrator.stages import trial_run as trial_stage
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.trial import side_by_side
from orchestrator.stages.trial_run import run_trial, run_trials
from orchestrator.store import ArtifactStore, TrialRecord

QUICK = {"train__steps": 4, "prompt__length": 2}


@pytest.fixture
def store(encoded) -> ArtifactStore:
    return ArtifactStore(encoded)


@pytest.fixture
def seeds(trial) -> list[TrialSpec]:
    return [trial("fpl", seed=seed, **QUICK) for seed in (1, 2, 3)]


def info(record: TrialRecord) -> Any:
    return json.loads((record.path / "record.json").read_text())["info"]


def staged(store: ArtifactStore) -> list[Path]:
    return [path for path in (store.artifacts / "trials" / "v1").iterdir() if path.name[0] == "."]


def test_trials_side_by_side_have_the_same_records_as_alone(
    trial, seeds, store, features, tmp_path
):
    """Seeds of a point, and a point of another method, learning rate and number of rounds."""
    other = {"iterations": 2, "train__learning_rate": 0.05, **QUICK}
    specs = [*seeds, trial("cpl", seed=1, **other)]
    progress: dict[int, list[float]] = {index: [] for index in range(4)}
    curves: dict[int, list[Any]] = {index: [] for index in range(4)}
    started = time.monotonic()
    together = run_trials(
        specs,
        WorkerContext(store),
        report=lambda index, done, total: progress[index].append(done / total),
        report_curves=lambda index, so_far: curves[index].append(deepcopy(so_far)),
    )
    took = time.monotonic() - started
    alone = ArtifactStore(Path(shutil.copytree(features, tmp_path / "alone")))
    for ours, spec in zip(together, specs, strict=True):
        assert isinstance(ours, TrialRecord)
        theirs = run_trial(spec, alone)
        assert ours.key == theirs.key
        assert ours.metrics.keys() == theirs.metrics.keys()
        assert ours.curves == {
            name: pytest.approx(of, rel=1e-4) for name, of in theirs.curves.items()
        }
        same = ours.predictions()[1] == theirs.predictions()[1]
        assert same.sum() >= len(same) - 1
        np.testing.assert_allclose(ours.prompt(), theirs.prompt(), rtol=1e-3, atol=1e-5)
    # Each trial has its share of the time, so the sum is the time of the job.
    assert sum(record.seconds for record in together) <= took
    assert sum(record.metrics["time/train_s"] for record in together) <= took
    assert all(shares == sorted(shares) and shares[-1] == 1 for shares in progress.values())
    for index, record in enumerate(together):
        assert curves[index] == [
            {name: values[:rounds] for name, values in record.curves.items()}
            for rounds in range(1, specs[index].iterations + 1)
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
    run_trials([seeds[0], seeds[2]], WorkerContext(store))
    assert (first.path / "record.json").stat().st_mtime_ns == written_at


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


# ---------------------------------------------------------------- checkpoints

CLOCK = ("time/train_s",)
LONG = {**QUICK, "iterations": 4}


def numbers(record: TrialRecord) -> Any:
    """What a record says of a trial, without times."""
    found = info(record)
    metrics = {name: value for name, value in found["metrics"].items() if name not in CLOCK}
    files = {file.name: file.read_bytes() for file in record.path.glob("*.safetensors")}
    return {**found, "metrics": metrics, "startup": None}, files


def in_third_round(act: Callable[[], None]) -> Callable[[int, int, int], None]:
    """A `report` of `run_trials` that acts in the third of four rounds."""
    return lambda index, done, total: act() if done > 2 / 4 * total else None


def kill_in_third_round(root: Path, specs: list[TrialSpec]) -> None:
    """Run trials side by side until SIGKILL ends this process."""
    trial_stage.CHECKPOINT_INTERVAL = 0.0
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)
    run_trials(specs, WorkerContext(ArtifactStore(root)), in_third_round(kill))


def stop_in_third_round(store: ArtifactStore, specs: list[TrialSpec]) -> None:
    """Run trials until the third round, in which each of them fails."""

    def end() -> None:
        raise KeyError

    problems = run_trials(specs, WorkerContext(store), in_third_round(end))
    assert [type(problem) for problem in problems] == [KeyError] * len(specs)
    assert staged(store) == []


def checkpoints(store: ArtifactStore) -> list[Path]:
    return [*store.root.glob("unfinished/*")]


@pytest.fixture
def fits(monkeypatch) -> list[int]:
    """The number of trials in each round that is trained."""
    fit, sizes = core.fit, []
    monkeypatch.setattr(core, "fit", lambda some: sizes.append(len(some)) or fit(some))
    return sizes


def test_trials_killed_in_their_third_round_go_on_from_there(trial, store, tmp_path, fits):
    specs = [trial("cpl", seed=seed, **LONG) for seed in (1, 2, 3)]
    other = ArtifactStore(Path(shutil.copytree(store.root, tmp_path / "calm")))
    calm = run_trials(specs, WorkerContext(other))
    assert fits == [3] * 4
    killed = get_context("spawn").Process(target=kill_in_third_round, args=(store.root, specs))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not any(map(store.has, specs))
    assert len(checkpoints(store)) == 3
    records = run_trials(specs, WorkerContext(store))
    assert fits == [3] * (4 + 2)  # the third and the fourth round
    for record, expected in zip(records, calm, strict=True):
        assert numbers(record) == numbers(expected)
        assert record.seconds > 0
        assert 0 <= record.startup < record.seconds
    assert checkpoints(store) == []


@pytest.mark.parametrize("damage", ["cut", "of another trial"])
def test_a_damaged_checkpoint_is_not_used(trial, store, fits, monkeypatch, damage):
    monkeypatch.setattr(trial_stage, "CHECKPOINT_INTERVAL", 0.0)
    specs = [trial("cpl", seed=seed, **LONG) for seed in (1, 2)]
    stop_in_third_round(store, specs)
    first, second = (store.checkpoint_path(spec) for spec in specs)
    first.write_bytes(first.read_bytes()[:-9] if damage == "cut" else second.read_bytes())
    fits.clear()
    run_trials(specs, WorkerContext(store))
    assert fits == [2, 2, 1, 1]  # the first trial starts again, the second one continues
