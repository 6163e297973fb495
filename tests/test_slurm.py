"""The Slurm script on a real Slurm with two nodes: run, stopped, resumed, and nodes lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.helpers.slurm import MISSING, WHY, Slurm
from tests.helpers.sweeps import (
    all_runs,
    continue_with,
    events,
    many_trials,
    result_slots,
    stopping_python,
    table,
    wait_for_stopped,
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
    """A folder on the shared disk."""
    path: Path = slurm.shared / request.node.name
    path.mkdir()
    return path


def outcome(store: Path, name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads(
        (store / "sweeps" / "default" / name / "outcome.json").read_text()
    )
    return content


def leftovers(slurm: Slurm, job: str, folder: Path) -> list[object]:
    """Processes and files of Ray, and the token, that remain after a job."""
    paths = [folder / f".airsweep-{job}", *ray_folders(slurm, job)]
    remaining: list[object] = [path for path in paths if path.exists()]
    for process in psutil.process_iter(["cmdline"]):
        if any(f"/tmp/ray-{job}-" in word for word in process.info["cmdline"] or []):
            remaining.append(process)
    return remaining


def wait_for_end(slurm: Slurm, job: str, folder: Path, state: str, code: str) -> str:
    """Wait for the end of a job, assert how it ended, and return its log."""
    ended = slurm.ended(job)
    log = (folder / f"airsweep-{job}.log").read_text()
    assert ended == (state, code), log
    return log


def stopped_job(
    slurm: Slurm, folder: Path, arguments: Sequence[str | Path]
) -> tuple[str, psutil.Process]:
    """Submit the long sweep; returns the job and its driver, which has stopped itself (SIGSTOP)
    after its first trial."""
    count = len([*folder.glob("stopping-*")])
    interpreter, script = stopping_python(folder / f"stopping-{count}", "trial_done")
    job = slurm.submit(folder, *arguments, AIRSWEEP_PYTHON=str(interpreter))

    def log() -> str:
        file = folder / f"airsweep-{job}.log"
        text = file.read_text() if file.exists() else ""
        assert not slurm.is_over(job), text
        return text

    return job, wait_for_stopped(script, log)


def ray_folders(slurm: Slurm, job: str) -> list[Path]:
    return [
        folder
        for machine in slurm.nodes.values()
        for folder in (machine.disk / "tmp").glob(f"ray-{job}*")
    ]


def daemons(job: str, name: str) -> list[psutil.Process]:
    """Processes of a job's Ray by name."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == name
        and any(f"ray-{job}-" in word for word in process.info["cmdline"] or ())
    ]


def test_a_cancelled_job_on_two_nodes_resumes_and_starts_a_ray_that_dies_again(slurm, folder):
    """`scancel` signals all processes at once, including Ray's. While the job runs, other users of
    the nodes cannot read Ray's files. Options behind the store are those of `airsweep run`."""
    write_sweep(folder, "long", TRIALS)
    store = folder / "runs"
    timeout = "--export=ALL,RAY_gcs_rpc_server_reconnect_timeout_s=5"  # a minute by default
    options = ("--set", "seeds=[2]")
    arguments = (timeout, "--nodes=2", "--cpus-per-task=1", SCRIPT, "long.yaml", "runs", *options)
    job, driver = stopped_job(slurm, folder, arguments)
    modes = [oct(path.stat().st_mode & 0o777) for path in ray_folders(slurm, job)]
    assert modes == ["0o700", "0o700"]
    slurm.command("scancel", job)
    continue_with(driver, signal.SIGTERM)
    assert slurm.ended(job)[0] == "CANCELLED"

    again, driver = stopped_job(slurm, folder, arguments)
    [gcs] = daemons(again, "gcs_server")
    gcs.kill()
    wait_until(lambda: not daemons(again, "raylet"))  # until then trials could go on
    driver.send_signal(signal.SIGCONT)
    log = wait_for_end(slurm, again, folder, "COMPLETED", "0:0")
    assert "gcs_server [exit code=-9]" in log
    assert log.count("Ray ended unexpectedly; starting Ray again to resume the sweep") == 1
    assert [row["method"] for row in table(store, "long")] == ["fpl"] * COUNT, log
    assert outcome(store, "long")["exit_code"] == 0
    slots = result_slots(events(store, "long"))
    assert len(slots) == COUNT
    assert all(slot.endswith("seed=2") for slot in slots)
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    assert not leftovers(slurm, again, folder)


def test_a_terminated_job_resumes_and_continues_on_another_node_if_its_node_is_lost(slurm, folder):
    """Slurm sends SIGTERM to the script two minutes before the time limit: `--signal=B:TERM@120`.
    It requeues the job of a lost node, whose finished trials are kept, logged or not."""
    write_sweep(folder, "long", TRIALS)
    store = folder / "runs"
    arguments = ("--cpus-per-task=2", SCRIPT, "long.yaml", store)
    job, driver = stopped_job(slurm, folder, arguments)
    slurm.command("scancel", "--batch", "--signal=TERM", job)
    continue_with(driver, signal.SIGTERM)
    wait_for_end(slurm, job, folder, "FAILED", "143:0")
    assert outcome(store, "long")["state"] == "terminated"
    recorded = events(store, "long")
    assert recorded[-1]["event"] == "sweep_ended"
    closed = len(result_slots(recorded))
    assert closed < COUNT
    assert not leftovers(slurm, job, folder)

    job, _ = stopped_job(slurm, folder, arguments)
    node = slurm.command("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    slurm.lose(node)
    kept = len(result_slots(events(store, "long")))
    slurm.wait_for_requeue(job)
    wait_for_end(slurm, job, folder, "COMPLETED", "0:0")
    assert len(table(store, "long")) == COUNT
    assert len(result_slots(events(store, "long"))) == COUNT > kept > closed
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
