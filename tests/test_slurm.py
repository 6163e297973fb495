"""The Slurm script on a real Slurm with two nodes: stopped, resumed, and a node that is lost."""

from __future__ import annotations

import shutil
import signal
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
COUNT = 12


def ray_folders(slurm: Slurm, job: str) -> list[Path]:
    disks = [machine.disk for machine in slurm.nodes.values()]
    return [folder for disk in disks for folder in (disk / "tmp").glob(f"ray-{job}*")]


def ray_processes(job: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if any(f"ray-{job}-" in word for word in process.info["cmdline"] or ())
    ]


def test_a_job_resumes_after_its_time_limit_the_end_of_its_ray_and_the_loss_of_its_node(
    wires, features
):
    """Options behind the store are those of `airsweep run`. The driver always stops itself after
    its first trial, so that more are left."""
    slurm = Slurm(wires)
    store = Path(shutil.copytree(features, slurm.shared / "runs"))
    write_sweep(slurm.shared, "long", many_trials(COUNT))
    interpreter, script = stopping_python(slurm.shared / "stopping", "trial_done")
    slurm.variables |= {
        "AIRSWEEP_PYTHON": str(interpreter),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # a minute by default
    }
    arguments = (str(SCRIPT), "long.yaml", "runs", "--set", "seeds=[2]")

    def stopped_driver() -> psutil.Process:
        def log() -> str:
            assert not slurm.is_over(job), slurm.log_of(job)
            return slurm.log_of(job)

        driver = wait_for_stopped(script, log)
        (script.parent / "started").rmdir()  # the next driver stops, too
        return driver

    # Slurm sends SIGTERM to the script two minutes before the time limit: `--signal=B:TERM@120`.
    job = slurm.submit("--nodes=2", "--cpus-per-task=1", *arguments)
    driver = stopped_driver()
    modes = [oct(path.stat().st_mode & 0o777) for path in ray_folders(slurm, job)]
    assert modes == ["0o700", "0o700"]  # other users of the nodes cannot read Ray's files
    slurm.command("scancel", "--batch", "--signal=TERM", job)
    continue_with(driver, signal.SIGTERM)
    assert slurm.ended(job) == ("FAILED", "143:0"), slurm.log_of(job)
    recorded = events(store, "long")
    assert (recorded[-1]["event"], recorded[-1]["exit_code"]) == ("sweep_ended", 143)
    token = slurm.shared / f".airsweep-{job}"
    assert not [*ray_folders(slurm, job), *ray_processes(job), *filter(Path.exists, [token])]

    job = slurm.submit("--cpus-per-task=2", *arguments)
    driver = stopped_driver()
    [gcs] = [process for process in ray_processes(job) if process.info["name"] == "gcs_server"]
    gcs.kill()
    # Until the other processes have ended, too, trials could go on.
    wait_until(lambda: "raylet" not in [process.info["name"] for process in ray_processes(job)])
    driver.send_signal(signal.SIGCONT)
    stopped_driver()  # that of the second Ray
    assert "gcs_server [exit code=-9]" in slurm.log_of(job)
    assert slurm.log_of(job).count("starting Ray again to resume the sweep") == 1

    kept = len(result_slots(events(store, "long")))
    slurm.lose(slurm.command("squeue", "--noheader", f"--jobs={job}", "--format=%N"))
    slurm.wait_for_requeue(job)
    stopped_driver().send_signal(signal.SIGCONT)
    assert slurm.ended(job) == ("COMPLETED", "0:0"), slurm.log_of(job)
    slots = result_slots(events(store, "long"))
    assert len(slots) == len(table(store, "long")) == COUNT > kept > len(result_slots(recorded))
    assert all(slot.endswith("seed=2") for slot in slots)
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
