"""kill -9 anywhere, the same command again: the results of an undisturbed run, nothing doubled."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.sweeps import (
    airsweep,
    all_runs,
    children,
    count,
    events,
    run_and_kill,
    table,
    write_sweep,
)

pytestmark = pytest.mark.ray

SEARCH = """
fixed: {{method: air_fpl, generator: "folder:{folder}", generation.block: 2, train.steps: 20}}
search:
  points: 5
  width: 2
  space:
    images_per_class: {{values: [0, 4, 8, 16]}}
    fusion_weight: {{min: 0.1, max: 0.9, when: "images_per_class > 0"}}
seeds: [1, 2]
resources: {{generator: {{actors: 1}}}}
"""
SHARDS = 80  # 10 classes of 16 images, in blocks of 2
TRIALS = 10  # 5 points x 2 seeds


def shards(store: Path) -> dict[str, int]:
    """When each shard was last written."""
    row = next((store / "artifacts" / "images" / "v1").iterdir())
    return {file.name: file.stat().st_mtime_ns for file in row.glob("*.parquet")}


def points(store: Path) -> list[tuple]:
    asked = [one for one in events(store, "search") if one["event"] == "point_asked"]
    return sorted((one["point"], sorted(one["params"].items())) for one in asked)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, drawn_digits) -> tuple[Path, Path]:
    """One sweep twice: undisturbed, and killed while it drew images and while it searched."""
    folder = tmp_path_factory.mktemp("search")
    spec = write_sweep(folder, "search", SEARCH.format(folder=drawn_digits))
    whole, killed = folder / "whole", folder / "killed"
    airsweep("run", spec, "--store", whole)
    shutil.copytree(whole / "artifacts" / "features", killed / "artifacts" / "features")

    run_and_kill(spec, killed, lambda found: count(found, "artifact_prepared", stage="images") > 9)
    drawn = shards(killed)
    assert 0 < len(drawn) < SHARDS
    # Trials are handed out before their images are drawn: one that is done says that others train.
    run_and_kill(spec, killed, lambda found: count(found, "trial_done") > 2)
    assert count(events(killed, "search"), "trial_done") < TRIALS
    airsweep("run", spec, "--store", killed)
    assert {name: shards(killed)[name] for name in drawn} == drawn
    return whole, killed


def test_a_killed_sweep_ends_with_the_table_of_an_undisturbed_one(stores):
    whole, killed = stores
    assert table(killed, "search") == table(whole, "search")


def test_a_killed_search_asks_the_points_of_an_undisturbed_one(stores):
    whole, killed = stores
    assert points(killed) == points(whole)
    assert len(points(whole)) == 5


def test_no_image_is_drawn_twice_after_a_kill(stores):
    _, killed = stores
    prepared = [one for one in events(killed, "search") if one.get("stage") == "images"]
    assert sum(one["facts"]["drawn"] for one in prepared) <= 2 * SHARDS
    assert len(shards(killed)) == SHARDS


def test_no_mlflow_run_stays_running_or_is_doubled_after_a_kill(stores):
    _, killed = stores
    assert {run.info.status for run in all_runs(killed)} == {"FINISHED"}
    slots = Counter(run.data.tags["air.slot"] for run in children(killed, "search"))
    assert len(slots) == TRIALS
    assert set(slots.values()) == {1}
