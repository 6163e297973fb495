"""`ray job submit` of a sweep to a cluster that `ray start --head` made, as the README says."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.clusters import BIN
from tests.clusters import head as ray_head
from tests.sweeps import (
    TIMEOUT,
    all_runs,
    count,
    environment,
    events,
    many_trials,
    table,
    write_sweep,
)

pytestmark = [pytest.mark.integration, pytest.mark.ray]

SWEEP = "fixed: {method: fpl, train.steps: 5}\nseeds: [1]\n"
COMMIT = "0123abc"  # of a working directory without its .git
COUNT = 16
TRIALS = many_trials(COUNT)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with ray_head(jobs=True, cpus=2) as address:
        yield address


def submit(address: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            BIN / "ray",
            "job",
            "submit",
            "--address",
            address,
            "--working-dir",
            str(folder),
            "--runtime-env-json",
            json.dumps({"env_vars": {"AIRSWEEP_COMMIT": COMMIT}}),
            "--",
            "python",
            "-m",
            "orchestrator",
            *arguments,
        ],
        env=environment(RAY_AUTH_MODE="disabled"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_submitted_sweep_runs_and_leaves_its_results_in_the_store(head, tmp_path):
    store = tmp_path / "runs"
    write_sweep(tmp_path / "job" / "sweeps", "job", SWEEP)
    done = submit(head, tmp_path / "job", "run", "sweeps/job.yaml", "--store", str(store))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fpl" in done.stdout
    assert [row["method"] for row in table(store, "job")] == ["fpl"]
    outcome = json.loads((store / "sweeps" / "default" / "job" / "outcome.json").read_text())
    assert outcome["exit_code"] == 0
    first, *_, last = events(store, "job")
    assert (first["commit"], last["event"]) == (COMMIT, "sweep_ended")


def test_a_relative_store_in_a_job_is_refused_with_the_remedy(head, tmp_path):
    write_sweep(tmp_path / "job" / "sweeps", "job", SWEEP)
    done = submit(head, tmp_path / "job", "run", "sweeps/job.yaml")
    assert done.returncode == 1  # Ray knows 0 and 1 only
    assert "exit code 3" in done.stdout + done.stderr
    assert "--store" in done.stdout + done.stderr


def test_a_stopped_job_says_how_it_ended_and_the_same_command_goes_on(head, tmp_path, monkeypatch):
    """`ray job stop` sends SIGTERM and, three seconds later, SIGKILL."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.job_submission import JobSubmissionClient

    from orchestrator.tracking.runs import create_database

    store = tmp_path / "runs"
    write_sweep(tmp_path / "job" / "sweeps", "stopped", TRIALS)
    command = f"python -m orchestrator run sweeps/stopped.yaml --store {store}"
    store.mkdir()
    create_database(store / "mlflow.db")  # seconds, in which a fast machine would be done
    client = JobSubmissionClient(head)
    folder = {"working_dir": str(tmp_path / "job")}
    job = client.submit_job(entrypoint=command, runtime_env=folder)
    deadline = time.monotonic() + TIMEOUT
    while not finished_in(store / "mlflow.db"):
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        assert time.monotonic() < deadline, "no trial was told"
        time.sleep(0.05)

    asked = time.time()
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.05)
    found = events(store, "stopped")
    assert count(found, "trial_done") < COUNT
    assert found[-1]["time"] - asked < 3
    assert (found[-1]["event"], found[-1]["exit_code"]) == ("sweep_ended", 143)
    outcome = json.loads((store / "sweeps" / "default" / "stopped" / "outcome.json").read_text())
    assert outcome["state"] == "terminated"
    told = {(run.data.tags["air.kind"], run.info.status) for run in all_runs(store)}
    assert told - {("point", "FINISHED")} == {("sweep", "KILLED"), ("trial", "FINISHED")}

    again = submit(head, tmp_path / "job", *command.split()[3:])
    assert again.returncode == 0, again.stdout + again.stderr
    found = events(store, "stopped")  # what ended while the driver did is there, and reused
    assert count(found, "trial_done") + count(found, "trial_reused") == COUNT
    runs = all_runs(store)
    assert {run.info.status for run in runs} == {"FINISHED"}
    named = {run.data.tags.get("air.slot") or run.data.tags.get("air.point") for run in runs}
    points = [run for run in runs if run.data.tags["air.kind"] == "point"]
    assert len(named) == len(runs) == COUNT + len(points) + 1


def finished_in(database: Path) -> int:
    if not database.exists():
        return 0
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return int(
            connection.execute("select count(*) from runs where status = 'FINISHED'").fetchone()[0]
        )
