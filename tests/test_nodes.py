"""A sweep on several machines: lost, cut off, added, and lost all together.

Submitted from a laptop, as people do. The table is that of one machine, whatever happens.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.nodes import Job, Nodes, scaling
from tests.helpers.sweeps import (
    airsweep,
    all_runs,
    children,
    count,
    events,
    table,
    wait_until,
    write_sweep,
)

pytestmark = [pytest.mark.integration, pytest.mark.ray]

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
OF_RAY = re.compile(r" (cli|sdk|dashboard_sdk|packaging|job_manager)\.py:\d+ -- ")  # its own talk


@pytest.fixture(scope="module")
def spec(wires, drawn_digits) -> Path:
    """On the disk that all machines see, with what it reads."""
    from PIL import Image, ImageOps

    folder = Path(shutil.copytree(drawn_digits, wires.shared / "drawn")).parent
    for file in drawn_digits.rglob("*.png"):
        mirrored = folder / "thin" / file.relative_to(drawn_digits)
        mirrored.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.autocontrast(Image.open(file).resize((28, 28))).save(mirrored)
    body = SWEEP.format(folder=folder / "drawn", other=folder / "thin", block=BLOCK)
    return write_sweep(folder, NAME, body)


@pytest.fixture(scope="module")
def alone(spec) -> Path:
    """The store of a run on this machine alone."""
    store = spec.parent / "alone"
    airsweep("run", spec, "--store", store)
    return store


Met = Callable[[list[dict[str, Any]]], bool]  # what a ledger says so far


def until(met: Met, job: Job, store: Path) -> None:
    def is_met() -> bool:
        assert not job.over(), job.log()
        return met(events(store, NAME))

    wait_until(is_met, job.log)


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


@pytest.fixture
def cluster(wires) -> Iterator[Nodes]:
    with closing(Nodes(wires)) as found:
        yield found


def test_machines_that_are_cut_off_lost_and_added_change_nothing(spec, alone, wires, cluster):
    """By `ray job submit`, whose working directory goes from the laptop to each machine."""
    store = wires.shared / "changing"
    (cluster.laptop.home / "sweep.yaml").write_text(spec.read_text())

    def submitted(to: Path) -> Job:
        words = ("ray", "job", "submit", f"--address={cluster.address}", "--working-dir=.", "--")
        run = ("python", "-m", "orchestrator", "run", "sweep.yaml", "--store", to)
        return cluster.follow(*words, *run)

    refused = submitted(Path("/tmp/runs"))  # which each machine has for itself
    assert refused.wait() == 1
    assert "/tmp/runs is not there; give --store" in refused.log()
    job = submitted(store)
    until(drawing(store), job, store)
    cluster.machines[0].unplug()
    kept = drawn(store)
    cluster.add()
    job.until_said("marked dead")
    cluster.machines[0].plug()  # Ray has given it up, and it is to notice
    until(lambda found: count(found, "trial_done") > 0, job, store)
    cluster.machines[1].lose()  # whatever it does, which may be a trial
    assert job.wait() == 0, job.log()
    assert {name: drawn(store)[name] for name in kept} == kept
    assert_as_alone(store, alone)
    log = [line for line in job.log().splitlines() if not OF_RAY.search(line)]
    assert not [line for line in log if "Traceback" in line or "\x1b" in line]


def test_a_cluster_without_machines_gets_some_where_the_sweep_waits_for_them(tmp_path, monkeypatch):
    small = write_sweep(tmp_path, NAME, "fixed: {method: fpl, train.steps: 5}\nseeds: [1]\n")
    command = ("run", small, "--store", tmp_path / "runs")
    with scaling(monkeypatch) as address:
        refused = airsweep(*command, check=False, RAY_ADDRESS=address)
        assert refused.returncode == 3
        assert "a trial requires 1 CPU" in refused.stderr
        waited = ("--set", "resources.wait=10m")
        assert "fpl" in airsweep(*command, *waited, RAY_ADDRESS=address).stdout


def test_images_of_the_next_cells_are_drawn_while_trials_run(alone):
    """Seen on one machine with two cores, one of which stays with the generators."""
    found = events(alone, NAME)
    first = next(one for one in found if one["event"] == "trials_started")
    last = [one for one in found if one["event"] == "trial_done"][-1]
    meanwhile = [at for at in drawn(alone).values() if first["time"] < at / 1e9 < last["time"]]
    assert len(meanwhile) >= SHARDS // 2
