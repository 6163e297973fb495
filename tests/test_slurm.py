"""The Slurm script, run by a real Slurm: over two nodes, stopped, and submitted again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.helpers.slurm import MISSING, WHY, Slurm
from tests.helpers.sweeps import (
    all_runs,
    count,
    events,
    many_trials,
    table,
    wait_until,
    write_sweep,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.ray,
    pytest.mark.skipif(bool(MISSING), reason=WHY),
]

SCRIPT = Path(__file__).parents[1] / "cluster" / "slurm" / "airsweep.sbatch"
COUNT = 8
TRIALS = many_trials(COUNT)


@pytest.fixture(scope="module")
def slurm(wires) -> Slurm:
    return Slurm(wires)


@pytest.fixture
def folder(slurm, request) -> Path:
    """On the disk that all nodes see."""
    found: Path = slurm.shared / request.node.name
    found.mkdir()
    return found


def outcome(store: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        (store / "sweeps" / "default" / name / "outcome.json").read_text()
    )
    return found


def left_by(slurm: Slurm, job: str, folder: Path) -> list[object]:
    """Ray's processes and files, and the token, of a job that is over."""
    places = [folder / f".airsweep-{job}", *folders_of_ray(slurm, job)]
    found: list[object] = [place for place in places if place.exists()]
    for process in psutil.process_iter(["cmdline"]):
        if any(f"/tmp/ray-{job}-" in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


def test_a_sweep_over_two_nodes_leaves_its_table_and_nothing_of_ray(slurm, folder):
    write_sweep(folder, "small", "fixed: {method: fpl, train.steps: 5}\nseeds: [1, 2]\n")
    store = folder / "runs"
    arguments = ("--nodes=2", "--cpus-per-task=1", SCRIPT, "small.yaml", "runs")
    job = slurm.submit(folder, *arguments, "--set", "seeds=[1]")
    ended = slurm.ended(job)
    log = (folder / f"airsweep-{job}.log").read_text()
    assert ended == ("COMPLETED", "0:0"), log
    assert [row["method"] for row in table(store, "small")] == ["fpl"], log
    assert outcome(store, "small")["exit_code"] == 0
    assert not left_by(slurm, job, folder)


def in_mid_run(slurm: Slurm, folder: Path, store: Path, arguments: Sequence[str | Path]) -> str:
    """A job of the long sweep that has done some of its trials."""
    job = slurm.submit(folder, *arguments)
    log = folder / f"airsweep-{job}.log"

    def is_met() -> bool:
        assert not slurm.is_over(job), log.read_text()
        return count(events(store, "long"), "trial_done") >= 2

    wait_until(is_met, log.read_text, every=0.3)
    return job


def test_a_job_that_is_told_to_stop_closes_its_sweep(slurm, folder):
    """As two minutes before its time is up: `--signal=B:TERM@120`."""
    write_sweep(folder, "long", TRIALS)
    store = folder / "runs"
    arguments = ("--cpus-per-task=2", SCRIPT, "long.yaml", store)
    job = in_mid_run(slurm, folder, store, arguments)
    slurm.ask("scancel", "--batch", "--signal=TERM", job)
    assert slurm.ended(job) == ("FAILED", "143:0")
    assert outcome(store, "long")["state"] == "terminated"
    found = events(store, "long")
    assert found[-1]["event"] == "sweep_ended"
    assert count(found, "trial_done") < COUNT
    assert not left_by(slurm, job, folder)


def folders_of_ray(slurm: Slurm, job: str) -> list[Path]:
    return [
        place
        for machine in slurm.nodes.values()
        for place in (machine.disk / "tmp").glob(f"ray-{job}*")
    ]


def test_after_scancel_in_mid_run_the_job_submitted_again_does_the_rest(slurm, folder):
    """It tells all processes at once, those of Ray as well. Until then, their files are closed to
    other users of the nodes."""
    write_sweep(folder, "long", TRIALS)
    store = folder / "runs"
    arguments = ("--nodes=2", "--cpus-per-task=1", SCRIPT, "long.yaml", "runs")
    job = in_mid_run(slurm, folder, store, arguments)
    modes = [oct(place.stat().st_mode & 0o777) for place in folders_of_ray(slurm, job)]
    assert modes == ["0o700", "0o700"]
    slurm.ask("scancel", job)
    assert slurm.ended(job)[0] == "CANCELLED"

    again = slurm.submit(folder, *arguments)
    assert slurm.ended(again) == ("COMPLETED", "0:0")
    assert len(table(store, "long")) == COUNT
    found = events(store, "long")
    assert count(found, "trial_done") + count(found, "trial_reused") == COUNT
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    assert not left_by(slurm, again, folder)


def test_a_ray_that_dies_in_mid_run_is_followed_by_another(slurm, folder):
    write_sweep(folder, "long", TRIALS)
    store = folder / "runs"
    soon = "--export=ALL,RAY_gcs_rpc_server_reconnect_timeout_s=5"  # a minute by default
    arguments = (soon, "--nodes=2", "--cpus-per-task=1", SCRIPT, "long.yaml", store)
    job = in_mid_run(slurm, folder, store, arguments)
    [gcs] = [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "gcs_server"
        and any(f"ray-{job}" in word for word in process.info["cmdline"])
    ]
    gcs.kill()
    ended = slurm.ended(job)
    log = (folder / f"airsweep-{job}.log").read_text()
    assert ended == ("COMPLETED", "0:0"), log
    assert "gcs_server [exit code=-9]" in log
    assert log.count("Ray ended by itself; the sweep goes on with another") == 1
    found = events(store, "long")
    assert count(found, "trial_done") + count(found, "trial_reused") == COUNT
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    assert not left_by(slurm, job, folder)


def test_a_node_that_is_lost_is_followed_by_the_other(slurm, folder):
    """Slurm puts the job back into its queue by itself, and what the lost one did is kept."""
    write_sweep(folder, "long", TRIALS)
    store = folder / "runs"
    job = in_mid_run(slurm, folder, store, ("--cpus-per-task=2", SCRIPT, "long.yaml", store))
    node = slurm.ask("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    slurm.nodes[node].lose()
    done = count(events(store, "long"), "trial_done")
    slurm.queued_again(job)
    assert slurm.ended(job) == ("COMPLETED", "0:0")
    assert len(table(store, "long")) == COUNT
    found = events(store, "long")
    assert count(found, "trial_done") == COUNT > done >= 2
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
