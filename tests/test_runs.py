"""One sweep by commands: run, shown, moved, reused; killed with SIGKILL and resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from air_core.datasets import get_dataset
from orchestrator.execution._allocation import RESERVE_DIVISOR
from orchestrator.store.event_log import CRASH_AT
from tests.helpers.sweeps import (
    airsweep,
    all_runs,
    children,
    damaged_files,
    events,
    python,
    run_and_kill,
    search_sweep,
    table,
    write_sweep,
)

pytestmark = [pytest.mark.ray, pytest.mark.integration]

BLOCK, SHARDS = 4, 40  # 10 classes of 16 images

# Runs in order: the event, counted from the start of a run, at which the driver is killed, and a
# process of Ray that is killed before it, with the event from which on. Workers that run finish
# their trials, and take the next ones, without driver or raylet. So the raylet is killed before
# the first trial of its run has a worker: some are left for the next run.
ALL_OF_RAY = ("raylet", "trials_started")
KILLS: list[tuple[str, tuple[str, ...]]] = [
    ("event:3", ()),
    ("artifact_prepared:12", ("ray::MapWorker", "images")),
    ("", ALL_OF_RAY),
    ("trial_retried:1", ("ray::ResourceTrainable", "trials_started")),
    ("", ()),
]
POINTS = 6  # zero_shot and fpl have nothing to search
TRIALS = 2 * POINTS


def shards(store: Path) -> dict[str, int]:
    """When each shard was last written."""
    row = next((store / "artifacts" / "images").glob("v*/*"), store)
    return {file.name: file.stat().st_mtime_ns for file in row.glob("*.parquet")}


def points(store: Path) -> list[tuple]:
    logged = [event for event in events(store, "search") if event["event"] == "point_asked"]
    return sorted((event["point"], sorted(event["params"].items())) for event in logged)


@pytest.fixture(scope="module")
def leak(tmp_path_factory, drawn_digits) -> tuple[Path, int]:
    """A folder of drawn digits; the first image is a copy of a test image."""
    folder = tmp_path_factory.mktemp("leak") / "images"
    shutil.copytree(drawn_digits, folder)
    digits = get_dataset("digits")
    examples = digits.load(None)
    test = int((examples.parts == "test").argmax())
    examples.images[test].save(folder / digits.classnames[0] / "000.png")
    return folder, test


@pytest.fixture(scope="module")
def spec(tmp_path_factory, leak) -> Path:
    return write_sweep(tmp_path_factory.mktemp("runs"), "search", search_sweep(leak[0], BLOCK))


@pytest.fixture(scope="module")
def whole(spec, leak) -> Path:
    """The store of an undisturbed run."""
    store = spec.parent / "whole"
    plan = json.loads(airsweep("plan", spec, "--store", store, "--json").stdout)
    # Both seeds share the zero_shot trial; the points of the search are unknown before the run.
    assert plan["trials"] == {
        "total": TRIALS,
        "done": 0,
        "reused": 0,
        "shared": 1,
        "recovered": 0,
        "to_run": TRIALS - 1,
    }
    assert [a["state"] for a in plan["artifacts"]] == ["missing", "missing"]
    assert not (store / "sweeps").exists()
    done = airsweep("run", spec, "--store", store)
    assert "zero_shot" in done.stdout
    folder, test = leak
    copied = f"folder:{folder} has copies of 1 test image of digits, so the accuracy is too high: "
    assert f"{copied}digit zero/000.png (test image {test})" in " ".join(done.stderr.split())
    return store


# ---------------------------------------------------------------- killed


def test_a_sweep_whose_driver_workers_and_ray_are_killed_has_the_results_of_an_undisturbed_one(
    spec, whole
):
    """`test_chaos.py` kills the driver at every event, without Ray."""
    store = spec.parent / "killed"
    shutil.copytree(whole / "artifacts" / "features", store / "artifacts" / "features")
    for number, (event, victim) in enumerate(KILLS, 1):
        before, drawn = len(events(store, "search")), shards(store)
        if victim:
            run = run_and_kill(spec, store, *victim, **{CRASH_AT: event})
        else:
            run = airsweep("run", spec, "--store", store, check=False, **{CRASH_AT: event})
        expected = -9 if event else 1 if victim is ALL_OF_RAY else 0
        assert run.returncode == expected, (number, run.stderr)
        if victim is ALL_OF_RAY:
            assert "Ray died on this machine" in run.stderr
            assert events(store, "search")[-1]["event"] == "sweep_ended"
        assert len(events(store, "search")) > before
        assert {name: shards(store)[name] for name in drawn} == drawn

    assert table(store, "search") == table(whole, "search")
    assert points(store) == points(whole)
    assert len(points(whole)) == 4
    log = events(store, "search")
    drawn = [e for e in log if e["event"] == "artifact_prepared" and e["stage"] == "images"]
    assert sum(event["facts"]["drawn"] for event in drawn) <= BLOCK * SHARDS  # none drawn twice
    assert len(shards(store)) == SHARDS
    retried = [event for event in log if event["event"] == "trial_retried"]
    assert {event["failure_class"] for event in retried} == {"infra"}
    assert_tracked_once(store)
    assert_sound(store)


def assert_tracked_once(store: Path) -> None:
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    slots = Counter(run.data.tags["air.slot"] for run in children(store, "search"))
    assert (len(slots), set(slots.values())) == (TRIALS, {1})


def assert_sound(store: Path) -> None:
    """All artifacts are undamaged and needed by a sweep."""
    assert damaged_files(store) == []
    removable = airsweep("cache", "gc", "--store", store, "--all-users", "--json")
    assert json.loads(removable.stdout)["removals"] == []


# ---------------------------------------------------------------- shown


def test_trials_do_not_wait_for_the_images_of_other_cells(whole):
    """zero_shot and fpl read no images: the pool that draws for air_fpl uses the reserve only."""
    outcome = json.loads((whole / "sweeps" / "default" / "search" / "outcome.json").read_text())
    first, *_ = outcome["run"]["pools"]
    assert first["actors"] <= max(1, (os.cpu_count() or 1) // RESERVE_DIVISOR)


def test_a_second_run_does_no_work_and_imports_neither_torch_nor_ray(spec, whole):
    before = len(events(whole, "search"))
    code = (
        "import sys; sys.argv = ['airsweep', *sys.argv[1:]]\n"
        "from orchestrator.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "bad = {'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    python("-c", code, "run", spec, "--store", whole)
    assert len(events(whole, "search")) == before


def test_the_store_of_a_run_has_no_damaged_or_unneeded_files_and_names_its_devices(whole):
    assert_sound(whole)
    records = [json.loads(file.read_bytes()) for file in whole.glob("artifacts/*/*/*/record.json")]
    made = [e for e in events(whole, "search") if e["event"] == "artifact_prepared"]
    blocks = [event["facts"] for event in made if event["stage"] == "images"]
    assert {(used["cpu"], used["gpu"]) for used in (*records, *blocks)} == {(1.0, 0.0)}
    listed = json.loads(airsweep("cache", "ls", "--store", whole, "--json").stdout)
    assert listed["leftovers"] == []  # which only killed processes leave
