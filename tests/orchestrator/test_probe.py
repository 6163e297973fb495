"""A little of the real work says how long all of it takes, until a run has measured it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from air_core.specs import LoraSpec
from orchestrator.estimate import (
    Pace,
    Work,
    estimate,
    read_probed,
    remember,
    remember_probed,
    stage_work,
    trial_work,
)
from orchestrator.image_rows import build_image_block, open_generator
from orchestrator.ledger import Ledger
from orchestrator.place import Place
from orchestrator.plan import Plan, plan_sweep
from orchestrator.probe import probe_work
from orchestrator.replicas import run_trials
from orchestrator.screens import plan_screen
from orchestrator.stages import build_features
from orchestrator.store import ArtifactStore
from orchestrator.sweep import GeneratorResources, Resources, Seeds, SweepSpec, TrialResources
from orchestrator.workshop import Workshop
from tests.sweeps import airsweep, write_sweep

GPUS = Resources(trial=TrialResources(gpu=0.5), generator=GeneratorResources(gpu=1))
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="here a probe would find a GPU")


def sweep(*methods: str, **fixed: Any) -> SweepSpec:
    every = {"images_per_class": 16, "lora.rounds": 1, **fixed}
    seeds = Seeds(values=((1,), (2,)))
    return SweepSpec(name="x", grid={"method": methods}, fixed=every, seeds=seeds)


def planned(asked: SweepSpec, store: ArtifactStore, resolver) -> Plan:
    return plan_sweep(asked, store, resolver, Ledger(store.root.parent / "sweep"))


def probe(plan: Plan, store: ArtifactStore) -> list[str]:
    said: list[str] = []
    probe_work(plan.work, Workshop(store), plan.sweep.resources, said.append)
    return said


@pytest.fixture(scope="module")
def probed(tmp_path_factory, resolver) -> tuple[SweepSpec, ArtifactStore, list[str]]:
    """A store in which nothing was done but a probe."""
    store = ArtifactStore(tmp_path_factory.mktemp("probed") / "runs")
    asked = sweep("zero_shot", "fpl", "air")
    return asked, store, probe(planned(asked, store, resolver), store)


@pytest.fixture
def copied(probed, tmp_path) -> tuple[SweepSpec, ArtifactStore]:
    asked, store, _ = probed
    copy = ArtifactStore(tmp_path / "runs")
    copy.root.mkdir()
    (copy.root / "probed.json").write_bytes((store.root / "probed.json").read_bytes())
    return asked, copy


def test_a_probe_leaves_nothing_to_guess_and_nothing_in_the_store(probed, resolver):
    asked, store, said = probed
    found = planned(asked, store, resolver).estimate
    assert (found.calibrated, found.reason, found.source) == (True, "", "probe")
    assert found.sources == dict.fromkeys(
        ("features", "labels", "lora", "images", "trials"), "probe"
    )
    assert all(seconds > 0 for seconds in found.stages.values())
    assert [file.name for file in store.root.rglob("*")] == ["probed.json"]
    kinds = [(work.stage, work.kind) for work in planned(asked, store, resolver).work]
    assert len(said) == len(set(kinds)) == 4 + 3  # three kinds of trials


def test_what_a_run_has_measured_counts_before_a_probe(copied, resolver):
    asked, store = copied
    before = planned(asked, store, resolver)
    trials = {
        (work.stage, work.kind): (10.0, 4.0) for work in before.work if work.stage == "trials"
    }
    remember(store, trials)
    found = planned(asked, store, resolver).estimate
    left = sum(work.units for work in before.work if work.stage == "trials")
    assert found.stages["trials"] == pytest.approx(2.5 * left)
    assert found.stages["lora"] == before.estimate.stages["lora"]
    assert (found.sources["trials"], found.sources["lora"]) == ("history", "probe")
    assert found.source == "history and probe"
    kept = read_probed(store)
    assert all("trials" not in line for line in probe(before, store))  # measured: not tried again
    trial_paces = {name: of for name, of in read_probed(store).paces.items() if name in trials}
    assert trial_paces == {name: of for name, of in kept.paces.items() if name in trials}


def test_the_screen_says_what_the_time_is_known_from(copied, resolver):
    asked, store = copied
    place = Place(store, "default", "x", None)
    screen = plan_screen(planned(asked, store, resolver), place, explain=False)
    assert "features, labels, lora, images, trials probed on CPU" in screen
    (store.root / "probed.json").unlink()
    screen = plan_screen(planned(asked, store, resolver), place, explain=False)
    assert "a guess" in screen
    assert "--probe" in screen


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> ArtifactStore:
    """Features and images of the tests below are made once."""
    return ArtifactStore(tmp_path_factory.mktemp("shared") / "runs")


@pytest.mark.parametrize(
    ("method", "fixed"),
    [
        ("air", {"train.steps": 60, "iterations": 3}),
        ("air_fpl", {}),
        ("cpl", {"train.steps": None, "train.epochs": 10, "train.batch": 16, "iterations": 4}),
        ("air", {"modality": "visual", "train.steps": 5, "iterations": 2, "synthetic_weight": 1}),
        ("cpl", {"paradigm": "trzsl", "train.steps": 60, "iterations": 3}),
        ("coop", {"paradigm": "ssl", "train.steps": 60}),
    ],
)
def test_trials_take_what_their_probe_says(
    method, fixed, drawn_digits, shared, resolver, monkeypatch
):
    """By the processor's time, which is this process's own on a busy machine, and within a factor
    of two, since what is tried in a test is short."""
    monkeypatch.setattr("orchestrator.probe._now", lambda device: time.process_time())
    asked = sweep(method, generator=f"folder:{drawn_digits}", pool_size=200, **fixed)
    plan = planned(asked, shared, resolver)
    [work] = [work for work in plan.work if work.stage == "trials"]
    _prepare(plan, shared)
    probe(replace(plan, work=(work,)), shared)
    said = read_probed(shared).paces["trials", work.kind].seconds * work.units
    started = time.process_time()
    records = run_trials([slot.spec for slot in plan.slots], shared)
    taken = time.process_time() - started
    assert not any(isinstance(record, Exception) for record in records)
    print(f"{work.kind}: said {said:.2f} s, took {taken:.2f} s")
    assert taken / 2 < said < taken * 2


def _prepare(plan: Plan, store: ArtifactStore) -> None:
    shop = Workshop(store)
    for need in plan.needs:
        if need.stage == "features":
            build_features(need.spec, shop)
        if need.stage == "images":
            generator = open_generator(need.spec.images, shop)
            for c, block in need.shards():
                build_image_block(need.spec, c, block, shop, lambda of=generator: of)


def test_a_kind_whose_inputs_are_missing_stays_a_guess_with_the_reason(copied, resolver):
    asked, store = copied
    plan = planned(asked, store, resolver)
    [lora] = [work for work in plan.work if work.stage == "lora"]
    spec: LoraSpec = lora.examples[0]
    gone = replace(spec, model=replace(spec.model, name="/nowhere/at/all"))
    lacking = stage_work(gone)
    [line] = probe(replace(plan, work=(lacking,)), store)
    assert "/nowhere/at/all" in line
    found = estimate([lacking, *plan.work], store, Resources())
    assert not found.calibrated
    assert (found.sources["lora"], found.sources["images"], found.source) == (
        "guess",
        "probe",
        "guess",
    )
    assert "whose probe failed" in found.reason
    assert "/nowhere/at/all" in found.reason
    remember_probed(store, {("lora", lora.kind): "no memory left"})
    assert ("lora", lora.kind) in read_probed(store).paces  # what was measured stays


@NO_GPU
def test_gpu_hours_of_a_probe_without_a_gpu_are_not_calibrated(copied, resolver):
    asked, store = copied
    found = planned(replace(asked, resources=GPUS), store, resolver).estimate
    assert found.source == "probe"
    assert not found.calibrated
    assert "probed on a CPU" in found.reason
    assert found.json()["probed_on"] == ["CPU"]
    trials_alone = replace(GPUS, trial=TrialResources())
    reason = planned(replace(asked, resources=trials_alone), store, resolver).estimate.reason
    assert "trials" not in reason
    assert "lora" in reason


def test_the_least_time_by_the_clock_is_that_of_all_workers_that_fit(tmp_path):
    work = [
        Work("features", "f", 1, 1),
        Work("lora", "l", 100, 1),
        Work("images", "i", 80, 10),
        Work("trials", "t", 12, 4),
    ]
    one = {"features": 8.0, "lora": 1.0, "images": 0.5, "trials": 2.0}
    store = ArtifactStore(tmp_path)
    remember_probed(store, {(w.stage, w.kind): Pace(one[w.stage], 0.0, "CPU") for w in work})
    two, eight = [{"CPU": 2.0}], [{"CPU": 4.0}, {"CPU": 4.0}]
    assert estimate(work, store, Resources(), two).wall == 8 + 100 + 40 / 2 + 24 / 2
    assert estimate(work, store, Resources(), eight).wall == 8 + 100 + 40 / 8 + 24 / 4
    three = Resources(generator=GeneratorResources(actors=3))
    assert estimate(work, store, three, eight).wall == pytest.approx(8 + 100 + 40 / 3 + 24 / 4)
    assert estimate(work, store, GPUS, two).wall is None
    assert estimate(work, store, Resources(), two).seconds == 8 + 100 + 40 + 24


def test_trials_with_more_to_do_are_a_kind_of_their_own(trial):
    kinds = [
        trial_work(trial(method, **more)).kind
        for method, more in [
            ("cpl", {}),
            ("cpl_real", {}),
            ("air", {"synthetic_weight": 0.0}),
            ("air", {"synthetic_weight": 1.0}),
        ]
    ]
    assert kinds[1] == kinds[2]
    assert len(set(kinds)) == 3


def test_plan_with_a_probe_prints_json_alone_and_the_next_plan_knows_it(tmp_path):
    spec = write_sweep(tmp_path, "small", "grid: {method: [zero_shot, fpl]}\nseeds: [1, 2]\n")
    store: Path = tmp_path / "runs"
    done = airsweep("plan", spec, "--store", store, "--probe", "--json")
    found = json.loads(done.stdout)["estimate"]
    assert (found["source"], found["calibrated"]) == ("probe", True)
    assert "s a trial on CPU" in done.stderr
    again = json.loads(airsweep("plan", spec, "--store", store, "--json").stdout)["estimate"]
    assert again == found
