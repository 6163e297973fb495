"""`ray job submit` of a sweep to a cluster that `ray start --head` made, as the README says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sweeps import environment, events, table, write_sweep

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SWEEP = "fixed: {method: fpl, train.steps: 5}\nseeds: [1]\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A one-node cluster on loopback; only its own processes are ended afterwards."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
    port = free_port()
    env = environment(
        RAY_AUTH_MODE="disabled",
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
        RAY_USAGE_STATS_ENABLED="0",
    )
    subprocess.run(
        [
            BIN / "ray",
            "start",
            "--head",
            f"--port={free_port()}",
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={port}",
            # Its default port is taken where another Ray runs; jobs then find no agent.
            f"--dashboard-agent-listen-port={free_port()}",
            "--num-cpus=2",
            f"--temp-dir={folder}",
        ],
        env=env,
        check=True,
        capture_output=True,
        timeout=120,
    )
    yield f"http://127.0.0.1:{port}"
    for process in Path("/proc").iterdir():
        try:
            line = (process / "cmdline").read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            continue
        if folder in line:
            os.kill(int(process.name), signal.SIGKILL)
    time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)


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
    assert events(store, "job")[-1]["event"] == "sweep_ended"


def test_a_relative_store_in_a_job_is_refused_with_the_remedy(head, tmp_path):
    write_sweep(tmp_path / "job" / "sweeps", "job", SWEEP)
    done = submit(head, tmp_path / "job", "run", "sweeps/job.yaml")
    assert done.returncode == 1  # Ray knows 0 and 1 only
    assert "exit code 3" in done.stdout + done.stderr
    assert "--store" in done.stdout + done.stderr
