"""kill -9 anywhere, the same command again: the results of an undisturbed run, nothing doubled."""

from __future__ import annotations

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

GRID = """
grid: {{method: [cpl, air]}}
fixed:
  generator: "folder:{folder}"
  generation.block: 2
  images_per_class: 16
  iterations: 2
  train.steps: 30
  synthetic_weight: 0.3
seeds: [1, 2]
"""

SEARCH = """
fixed: {{method: air_fpl, generator: "folder:{folder}", train.steps: 20}}
search:
  points: 5
  width: 2
  space:
    images_per_class: {{values: [0, 4, 8, 16]}}
    fusion_weight: {{min: 0.1, max: 0.9, when: "images_per_class > 0"}}
seeds: [1, 2]
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, drawn_digits) -> tuple[Path, Path, list[dict]]:
    folder = tmp_path_factory.mktemp("grid")
    spec = write_sweep(folder, "grid", GRID.format(folder=drawn_digits))
    store = folder / "undisturbed"
    airsweep("run", spec, "--store", store)
    return spec, store, table(store, "grid")


def drawn(found: list[dict]) -> int:
    return sum(one["facts"]["drawn"] for one in found if one.get("stage") == "images")


def look(store: Path, spec: Path, expected: list[dict]) -> None:
    """What must hold after the run that came after a kill."""
    assert table(store, spec.stem) == expected
    found = events(store, spec.stem)
    assert drawn(found) <= 160
    assert all(run.info.status == "FINISHED" for run in all_runs(store))
    slots = Counter(run.data.tags["air.slot"] for run in children(store, spec.stem))
    assert set(slots.values()) == {1}
    assert len(slots) == 4


def test_killed_in_mid_generation(undisturbed, tmp_path):
    spec, _, expected = undisturbed
    store = tmp_path / "runs"
    run_and_kill(spec, store, lambda found: count(found, "artifact_prepared", stage="images") > 9)
    row = next((store / "artifacts" / "images" / "v1").iterdir())
    before = {file.name: file.stat().st_mtime_ns for file in row.glob("*.parquet")}
    assert 0 < len(before) < 80
    airsweep("run", spec, "--store", store)
    after = {file.name: file.stat().st_mtime_ns for file in row.glob("*.parquet")}
    assert len(after) == 80
    assert {name: after[name] for name in before} == before
    look(store, spec, expected)


def test_killed_in_mid_trial(undisturbed, tmp_path):
    spec, _, expected = undisturbed
    store = tmp_path / "runs"
    run_and_kill(spec, store, lambda found: count(found, "trials_started") > 0)
    airsweep("run", spec, "--store", store)
    look(store, spec, expected)


def test_a_search_killed_twice_asks_the_points_of_an_undisturbed_one(tmp_path, drawn_digits):
    spec = write_sweep(tmp_path, "search", SEARCH.format(folder=drawn_digits))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    airsweep("run", spec, "--store", whole)
    run_and_kill(spec, killed, lambda found: count(found, "trial_done") > 0)
    run_and_kill(spec, killed, lambda found: count(found, "point_asked") > 3)
    airsweep("run", spec, "--store", killed)

    def points(store: Path) -> list[tuple]:
        asked = [one for one in events(store, "search") if one["event"] == "point_asked"]
        return sorted((one["point"], sorted(one["params"].items())) for one in asked)

    assert points(killed) == points(whole)
    assert len(points(whole)) == 5
    assert table(killed, "search") == table(whole, "search")
    assert all(run.info.status == "FINISHED" for run in all_runs(killed))
