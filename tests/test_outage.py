"""A real MLflow server that dies in mid-sweep: the sweep ends as it would, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import MlflowServer
from tests.sweeps import (
    TIMEOUT,
    airsweep,
    count,
    environment,
    events,
    wait_until,
    write_sweep,
)

pytestmark = [pytest.mark.integration, pytest.mark.ray]

SWEEP = """
grid: {method: [zero_shot, fpl]}
fixed: {train.steps: 20}
seeds: [1, 2, 3, 4]
"""
TRIALS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    server = MlflowServer(folder / "served", folder / "log")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("outage"), "outage", SWEEP)


@pytest.fixture(scope="module")
def survived(spec: Path, server: MlflowServer) -> subprocess.CompletedProcess[str]:
    """A run whose server was killed after the first trial; the server is there again."""
    store = spec.parent / "runs"
    command = [sys.executable, "-m", "orchestrator", "run", str(spec), "--store", str(store)]
    process = subprocess.Popen(
        [*command, "--tracking-uri", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )

    def has_begun() -> bool:
        assert process.poll() is None, process.communicate()
        return count(events(store, "outage"), "trial_done") > 0

    wait_until(has_begun)
    server.kill()
    out, err = process.communicate(timeout=TIMEOUT)
    server.start()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def told(spec: Path, server: MlflowServer, survived: object) -> dict[str, Any]:
    """What `mlflow reconcile` says of it."""
    asked = ("mlflow", "reconcile", "outage", "--store", spec.parent / "runs")
    (found,) = json.loads(airsweep(*asked, "--tracking-uri", server.url, "--json").stdout)
    return found


def runs(server: MlflowServer) -> list[Any]:
    from orchestrator.tracking.mlflow import MlflowClient

    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("air/default")
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def test_a_sweep_outlives_its_server_and_says_what_to_type(spec, server, survived):
    assert survived.returncode == 0, survived.stderr
    assert "zero_shot" in survived.stdout
    lines = [line for line in survived.stderr.splitlines() if "mlflow reconcile" in line]
    assert len(lines) == 1
    assert f"airsweep mlflow reconcile outage --store {spec.parent / 'runs'}" in lines[0]
    assert f"--tracking-uri {server.url}" in lines[0]
    assert sum("does not answer" in line for line in survived.stderr.splitlines()) == 1


def test_what_the_server_missed_is_told_once(spec, server, told):
    assert told["told"] > 0
    assert (told["told"] + told["already_there"], told["gone"]) == (TRIALS, 0)
    there = ("--store", spec.parent / "runs", "--tracking-uri", server.url)
    again = airsweep("mlflow", "reconcile", *there)
    assert again.stdout == f"default/outage: nothing to send ({TRIALS} outcomes are there)\n"

    found = runs(server)
    assert {run.info.status for run in found} == {"FINISHED"}
    tags = [run.data.tags for run in found]
    slots = Counter(of.get("air.slot", "the sweep") for of in tags if of["air.kind"] != "point")
    assert len(slots) == TRIALS + 1
    points = Counter(of["air.point"] for of in tags if of["air.kind"] == "point")
    assert points.keys() == {of["air.point"] for of in tags if of["air.kind"] == "trial"}
    assert {*slots.values(), *points.values()} == {1}
