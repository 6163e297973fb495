"""A sweep on several machines: each a raylet of its own, lost, added, and lost all together.

Submitted as a job, as people do. The table is that of one machine, whatever happens.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import Nodes, nodes, scaling
from tests.sweeps import (
    TIMEOUT,
    airsweep,
    all_runs,
    children,
    count,
    events,
    table,
    write_sweep,
)

pytestmark = pytest.mark.ray

NAME, BLOCK, CLASSES = "nodes", 4, 10
# Two rows of images, so that the second can be drawn beside trials of the first.
SWEEP = """
grid: {{method: [fpl, air_fpl], generator: ["folder:{folder}", "folder:{other}"]}}
fixed: {{generation.block: {block}, images_per_class: 16, train.steps: 120}}
seeds: [1, 2]
resources: {{generator: {{reserve: 1}}}}
"""
SHARDS = 2 * CLASSES * 16 // BLOCK
TRIALS = 6  # fpl reads no image: one cell


@pytest.fixture(scope="module")
def spec(tmp_path_factory, drawn_digits) -> Path:
    from PIL import Image, ImageOps

    folder = tmp_path_factory.mktemp("nodes")
    for file in drawn_digits.rglob("*.png"):
        mirrored = folder / "thin" / file.relative_to(drawn_digits)
        mirrored.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.autocontrast(Image.open(file).resize((28, 28))).save(mirrored)
    body = SWEEP.format(folder=drawn_digits, other=folder / "thin", block=BLOCK)
    return write_sweep(folder, NAME, body)


@pytest.fixture(scope="module")
def alone(spec) -> Path:
    """The store of a run on this machine alone."""
    store = spec.parent / "alone"
    airsweep("run", spec, "--store", store)
    return store


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Nodes]:
    with nodes(monkeypatch) as found:
        yield found


def submitted(cluster: Nodes, spec: Path, store: Path) -> str:
    return cluster.submit("run", str(spec), "--store", str(store))


Met = Callable[[list[dict[str, Any]]], bool]  # what a ledger says so far


def until(met: Met, cluster: Nodes, job: str, store: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not met(events(store, NAME)):
        assert not cluster.client.get_job_status(job).is_terminal(), cluster.logs(job)
        assert time.monotonic() < deadline, cluster.logs(job)
        time.sleep(0.02)


def drawn(store: Path) -> dict[str, int]:
    """When each block was last written."""
    files = (store / "artifacts" / "images").rglob("*.parquet")
    return {f"{file.parent.name}/{file.name}": file.stat().st_mtime_ns for file in files}


def drawing(store: Path) -> Met:
    return lambda found: 4 < len(drawn(store)) < SHARDS


def assert_as_alone(store: Path, alone: Path) -> None:
    assert table(store, NAME) == table(alone, NAME)
    assert len(drawn(store)) == SHARDS
    found = events(store, NAME)
    assert count(found, "trial_done") + count(found, "trial_reused") == TRIALS
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    slots = Counter(run.data.tags["air.slot"] for run in children(store, NAME))
    assert (len(slots), set(slots.values())) == (TRIALS, {1})
    verified = json.loads(airsweep("cache", "verify", "--store", store, "--json").stdout)
    assert verified["damaged"] == []


def test_machines_that_are_lost_and_added_change_nothing(spec, alone, cluster, tmp_path):
    store = tmp_path / "runs"
    job = submitted(cluster, spec, store)
    until(drawing(store), cluster, job, store)
    cluster.kill(0)
    kept = drawn(store)
    cluster.add()
    until(lambda found: count(found, "trial_done") > 0, cluster, job, store)
    cluster.kill(1)  # whatever it does, which may be a trial
    cluster.wait(job)
    assert cluster.exit_code(job) == 0, cluster.logs(job)
    assert {name: drawn(store)[name] for name in kept} == kept
    assert_as_alone(store, alone)
    log = cluster.logs(job)
    assert "Traceback" not in log
    assert "\x1b" not in log
    assert all("marked dead" in line for line in log.splitlines() if line.startswith("(raylet)"))


def test_a_cluster_that_is_lost_whole_is_followed_by_another(spec, alone, tmp_path, monkeypatch):
    store = tmp_path / "runs"
    with nodes(monkeypatch) as first:
        job = submitted(first, spec, store)
        until(lambda found: count(found, "trial_done") > 0, first, job, store)
        first.lose_everything()
    before, kept = events(store, NAME), drawn(store)
    assert before[-1]["event"] != "sweep_ended"
    with nodes(monkeypatch) as second:
        job = submitted(second, spec, store)
        second.wait(job)
        assert second.exit_code(job) == 0, second.logs(job)
    assert {name: drawn(store)[name] for name in kept} == kept
    assert_as_alone(store, alone)


def test_a_cluster_without_machines_gets_some_where_the_sweep_waits_for_them(tmp_path, monkeypatch):
    small = write_sweep(tmp_path, NAME, "fixed: {method: fpl, train.steps: 5}\nseeds: [1]\n")
    command = ("run", small, "--store", tmp_path / "runs")
    with scaling(monkeypatch) as address:
        refused = airsweep(*command, check=False, RAY_ADDRESS=address)
        assert refused.returncode == 3
        assert "a trial asks for 1 CPU" in refused.stderr
        waited = ("--set", "resources.wait=10m")
        assert "fpl" in airsweep(*command, *waited, RAY_ADDRESS=address).stdout


def test_images_of_the_next_cells_are_drawn_while_trials_run(alone):
    """Seen on one machine with two cores, one of which stays with the generators."""
    found = events(alone, NAME)
    first = next(one for one in found if one["event"] == "trials_started")
    last = [one for one in found if one["event"] == "trial_done"][-1]
    meanwhile = [at for at in drawn(alone).values() if first["time"] < at / 1e9 < last["time"]]
    assert len(meanwhile) >= SHARDS // 2
