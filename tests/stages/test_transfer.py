"""Small real trials that test the prompt of one dataset on another dataset."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from air_core.datasets import get_dataset
from orchestrator.planning.plan import plan_sweep
from orchestrator.reporting.results import results_of
from orchestrator.spec import SweepSpec
from orchestrator.spec.sweep import Seeds
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.stages.features import read_target
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore, EventLog

QUICK = {
    "precision": "fp32",
    "train.steps": 5,
    "prompt.length": 2,
    "iterations": 1,
    "images_per_class": 0,
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, drawn_digits) -> Path:
    """Five classes of drawn digits, as a dataset other than the digits."""
    folder = tmp_path_factory.mktemp("others")
    for name in sorted(path.name for path in drawn_digits.iterdir())[:5]:
        shutil.copytree(drawn_digits / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, resolver, drawn) -> ArtifactStore:
    """A store with the features of both datasets."""
    store = ArtifactStore(tmp_path_factory.mktemp("transfer") / "runs")
    for name in ("digits", f"folder:{drawn}"):
        build_features(resolver.trial({**QUICK, "dataset": name}).features, WorkerContext(store))
    return store


def test_the_prompt_of_one_dataset_is_tested_with_the_classes_of_another(
    resolver, store, drawn, tiny_clip
):
    spec = resolver.trial({**QUICK, "test_dataset": f"folder:{drawn}", "seed": 1})
    transfer = run_trial(spec, store)
    before = set(store.artifacts.glob("trials/*/*"))
    learned = run_trial(replace(spec, test_dataset=None), store)
    assert set(store.artifacts.glob("trials/*/*")) == before  # it was learned for all datasets
    index, predictions, labels = transfer.predictions()
    target = read_target(spec.test_features, spec.split, store)
    assert np.array_equal(index, target.split.test)
    assert np.array_equal(labels, target.labels[index])
    names = get_dataset(f"folder:{drawn}").classnames
    weight = tiny_clip.encode_context(torch.from_numpy(learned.prompt()), names)
    assert np.array_equal(predictions, (target.features[index] @ weight.T).argmax(dim=-1))
    assert transfer.metrics["test/accuracy"] == (predictions == labels).mean()
    assert len(transfer.per_class) == 5
    # Objectives come from the dataset that the prompt was learned on.
    assert transfer.objectives == learned.objectives
    assert not any(name.startswith("test/") for name in transfer.curves)


def test_a_table_names_both_and_compares_within_each(store, resolver, drawn, tmp_path):
    sweep = SweepSpec(
        name="x",
        grid={"test_dataset": ("digits", f"folder:{drawn}"), "method": ("zero_shot", "fpl")},
        fixed={"train.steps": 2},
        seeds=Seeds(values=((1,),)),
    )
    event_log = EventLog(tmp_path / "sweep")
    plan = plan_sweep(sweep, store, resolver, event_log)
    for slot in plan.slots:
        run_trial(slot.spec, store)
    table = results_of(plan_sweep(sweep, store, resolver, event_log), store).rows
    assert [(row.dataset, row.method) for row in table] == [
        ("digits", "zero_shot"),
        ("digits", "fpl"),
        (f"digits -> folder:{drawn}", "zero_shot"),
        (f"digits -> folder:{drawn}", "fpl"),
    ]
