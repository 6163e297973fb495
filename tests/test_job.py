"""`ray job submit` of a sweep to a cluster that `ray start --head` made, as the README says.
`test_submit.py` has jobs that are stopped and submitted again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import BIN
from tests.clusters import head as ray_head
from tests.sweeps import TIMEOUT, environment, events, table, write_sweep

pytestmark = [pytest.mark.integration, pytest.mark.ray]

SWEEP = "fixed: {method: fpl, train.steps: 5}\nseeds: [1]\n"
COMMIT = "0123abc"  # of a working directory without its .git


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
        timeout=TIMEOUT,
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
