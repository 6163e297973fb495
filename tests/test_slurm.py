"""The Slurm script, run by a real Slurm: over two nodes, stopped, and submitted again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.slurm import MISSING, WHY, Slurm
from tests.sweeps import TIMEOUT, all_runs, count, events, many_trials, table, write_sweep

pytestmark = [
    pytest.mark.ray,
    pytest.mark.debian,
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
    name = f"ray-{job}"
    places = [folder / f".airsweep-{job}"]
    places += [machine.disk / "tmp" / name for machine in slurm.nodes.values()]
    found: list[object] = [place for place in places if place.exists()]
    for process in psutil.process_iter(["cmdline"]):
        if any(f"/tmp/{name}" in word for word in process.info["cmdline"] or []):
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
    log, deadline = folder / f"airsweep-{job}.log", time.monotonic() + TIMEOUT
    while count(events(store, "long"), "trial_done") < 2:
        assert not slurm.is_over(job), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
    return job


def whole_again(slurm: Slurm, folder: Path, store: Path, arguments: Sequence[str | Path]) -> str:
    """The job that was submitted again, and has done the rest."""
    again = slurm.submit(folder, *arguments)
    assert slurm.ended(again) == ("COMPLETED", "0:0")
    assert len(table(store, "long")) == COUNT
    found = events(store, "long")
    assert count(found, "trial_done") + count(found, "trial_reused") == COUNT
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    return again


def test_a_job_that_is_told_to_stop_closes_its_sweep_and_submitted_again_goes_on(slurm, folder):
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

    whole_again(slurm, folder, store, arguments)


def test_scancel_in_mid_run_loses_nothing(slurm, folder):
    """It tells all processes at once, those of Ray as well."""
    write_sweep(folder, "long", TRIALS)
    store = folder / "runs"
    arguments = ("--nodes=2", "--cpus-per-task=1", SCRIPT, "long.yaml", "runs")
    job = in_mid_run(slurm, folder, store, arguments)
    slurm.ask("scancel", job)
    assert slurm.ended(job)[0] == "CANCELLED"

    again = whole_again(slurm, folder, store, arguments)
    assert not left_by(slurm, again, folder)


def test_the_jobs_exit_code_is_that_of_airsweep(slurm, folder):
    (folder / "wrong.yaml").write_text("version: 1\nname: wrong\nfixed: {method: fp}\n")
    job = slurm.submit(folder, "--cpus-per-task=1", SCRIPT, "wrong.yaml", "runs")
    assert slurm.ended(job) == ("FAILED", "2:0")
    assert "did you mean fpl?" in (folder / f"airsweep-{job}.log").read_text()


def ray_wants(slurm: Slurm) -> dict[Path, str]:
    """The folder that Ray makes on each node for the job that is submitted next, and its number."""
    said = slurm.ask("scontrol", "show", "config")
    coming = next(line.split()[-1] for line in said.splitlines() if "NEXT_JOB_ID" in line)
    return {m.disk / "tmp" / f"ray-{coming}": coming for m in slurm.nodes.values()}


def test_a_ray_that_does_not_come_up_is_started_again(slurm, folder):
    write_sweep(folder, "small", "fixed: {method: fpl, train.steps: 5}\nseeds: [1]\n")
    taken = ray_wants(slurm)
    for place in taken:
        place.write_text("no folder; the script removes it with what Ray leaves")
    job = slurm.submit(folder, "--cpus-per-task=1", SCRIPT, "small.yaml", "runs")
    assert {job} == set(taken.values())
    ended = slurm.ended(job)
    log = (folder / f"airsweep-{job}.log").read_text()
    assert ended == ("COMPLETED", "0:0"), log
    assert "FileExistsError" in log
    assert log.count("Ray ended by itself; the sweep goes on with another") == 1
    assert len(table(folder / "runs", "small")) == 1
    for place in taken:
        place.unlink(missing_ok=True)
    assert not left_by(slurm, job, folder)


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
