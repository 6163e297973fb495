"""A sweep on several machines, submitted from a laptop, while machines are lost and added.

The results always equal those of a run on one machine.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.nodes import Job, Nodes, scaling
from tests.helpers.plugins import MARGIN
from tests.helpers.sweeps import (
    STOPPING,
    airsweep,
    all_runs,
    children,
    damaged_files,
    events,
    result_slots,
    table,
    write_sweep,
)

pytestmark = [pytest.mark.integration, pytest.mark.ray]

NAME, BLOCK, CLASSES = "nodes", 4, 10
# Two rows of images: the second can be drawn while trials with the first run.
# The strategy of the first method is a plugin, which travels with the job. The steps of the trials
# take longer than Ray needs to notice a lost machine.
SWEEP = """
plugins: [margin.py]
grid: {{method: [pseudo, air_fpl], generator: ["folder:{folder}", "folder:{other}"]}}
fixed: {{generation.block: {block}, images_per_class: 16, train.steps: 120}}
overrides: [{{when: {{method: pseudo}}, set: {{pseudo_labels.kind: margin, iterations: 1}}}}]
seeds: [1, 2]
resources: {{generator: {{reserve: 1}}}}
"""
SHARDS = 2 * CLASSES * 16 // BLOCK
TRIALS = 6  # pseudo uses no images, so its two cells are one
RAY_LOG = re.compile(r" (cli|sdk|dashboard_sdk|packaging|job_manager)\.py:\d+ -- ")


@pytest.fixture(scope="module")
def spec(wires, drawn_digits) -> Path:
    """The sweep file and its images on the shared disk."""
    from PIL import Image, ImageOps

    folder = Path(shutil.copytree(drawn_digits, wires.shared / "drawn")).parent
    for file in drawn_digits.rglob("*.png"):
        mirrored = folder / "thin" / file.relative_to(drawn_digits)
        mirrored.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.autocontrast(Image.open(file).resize((28, 28))).save(mirrored)
    (folder / "margin.py").write_text(MARGIN)
    body = SWEEP.format(folder=folder / "drawn", other=folder / "thin", block=BLOCK)
    return write_sweep(folder, NAME, body)


@pytest.fixture(scope="module")
def alone(spec, features) -> Path:
    """The store of a run on one machine, where one generator makes all images."""
    store, body = Path(shutil.copytree(features, spec.parent / "alone")), spec.read_text()
    spec.with_name("alone.yaml").write_text(body.replace("reserve: 1", "reserve: 1, actors: 1"))
    airsweep("run", spec.with_name("alone.yaml"), "--store", store)
    return store


def shard_times(store: Path) -> dict[str, int]:
    """Time of the last write of each shard of images."""
    files = (store / "artifacts" / "images").rglob("*.parquet")
    return {f"{file.parent.name}/{file.name}": file.stat().st_mtime_ns for file in files}


def assert_equal_results(store: Path, alone: Path) -> None:
    assert table(store, NAME) == table(alone, NAME)
    assert len(shard_times(store)) == SHARDS
    assert len(result_slots(events(store, NAME))) == TRIALS
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    slots = Counter(run.data.tags["air.slot"] for run in children(store, NAME))
    assert (len(slots), set(slots.values())) == (TRIALS, {1})
    assert damaged_files(store) == []


@pytest.fixture
def cluster(wires) -> Iterator[Nodes]:
    with closing(Nodes(wires)) as nodes:
        yield nodes


def test_results_are_equal_if_machines_are_disconnected_lost_and_added(spec, alone, wires, cluster):
    """Submitted by `ray job submit`, which sends the laptop's working directory to the machines."""
    store = wires.shared / "changing"
    (cluster.laptop.home / "sweep.yaml").write_text(spec.read_text())
    (cluster.laptop.home / "margin.py").write_text(MARGIN)
    (cluster.laptop.home / "stopping.py").write_text(STOPPING)

    def submitted(to: Path) -> Job:
        words = ("ray", "job", "submit", f"--address={cluster.address}", "--working-dir=.", "--")
        run = ("orchestrator", "run", "sweep.yaml", "--store", to)
        return cluster.follow(*words, "python", "stopping.py", "images", *run)

    refused = submitted(Path("/tmp/runs"))  # each machine has a separate /tmp
    assert refused.wait() == 1
    assert "/tmp/runs does not exist; give --store" in refused.log()
    job = submitted(store)
    with job.stopped():  # after the first block of images
        cluster.machines[0].unplug()
        before = shard_times(store)
        assert len(before) < SHARDS
        cluster.add()
        cluster.wait_for_count(2)  # the other one and the new one
    job.wait_for_log("marked dead")
    cluster.machines[0].plug()  # Ray counts the machine as dead; it ends when it notices
    cluster.machines[1].lose()  # possibly during a trial
    assert job.wait() == 0, job.log()
    assert {name: shard_times(store)[name] for name in before} == before
    assert_equal_results(store, alone)
    log = [line for line in job.log().splitlines() if not RAY_LOG.search(line)]
    assert not [line for line in log if "Traceback" in line or "\x1b" in line]


def test_an_autoscaler_starts_machines_for_a_sweep_with_resources_wait(
    tmp_path, encoded, monkeypatch
):
    small = write_sweep(tmp_path, NAME, "fixed: {method: fpl, train.steps: 5}\nseeds: [1]\n")
    command = ("run", small, "--store", encoded, "--tracking-uri", "none")
    with scaling(monkeypatch) as address:
        refused = airsweep(*command, check=False, RAY_ADDRESS=address)
        assert refused.returncode == 3
        assert "a trial requires 1 CPU" in refused.stderr
        waited = ("--set", "resources.wait=600")
        assert "fpl" in airsweep(*command, *waited, RAY_ADDRESS=address).stdout
    status = airsweep("status", NAME, "--store", encoded).stdout
    assert "peak memory of the driver" in status  # workers are no children of it


def test_images_of_the_next_cells_are_drawn_while_trials_run(alone):
    """On one machine with two cores, one of which is reserved for the generator."""
    recorded = events(alone, NAME)
    first = next(event for event in recorded if event["event"] == "trials_started")
    last = [event for event in recorded if event["event"] == "trial_done"][-1]
    times = [time / 1e9 for time in shard_times(alone).values()]
    during_trials = [time for time in times if first["time"] < time < last["time"]]
    assert len(during_trials) >= SHARDS // 2
