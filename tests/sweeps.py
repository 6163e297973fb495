"""Runs real sweeps in processes of their own, for tests that look from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 900  # seconds; a hang must not hang the tests, a busy machine must not fail them


def write_sweep(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(f"version: 1\nname: {name}\n{body}")
    return file


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **more}


def airsweep(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_and_kill(spec: Path, store: Path, when: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Start a run and kill -9 its driver as soon as the ledger satisfies `when`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(spec), "--store", str(store)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + TIMEOUT
    while not when(events(store, spec.stem)):
        if process.poll() is not None:
            raise AssertionError(f"ended before the kill: {process.stderr.read()}")
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def events(store: Path, name: str) -> list[dict[str, Any]]:
    file = store / "sweeps" / "default" / name / "events.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")]


def count(found: list[dict[str, Any]], event: str, **fields: Any) -> int:
    return sum(
        one["event"] == event and all(one.get(k) == v for k, v in fields.items()) for one in found
    )


def table(store: Path, name: str) -> list[dict[str, Any]]:
    done = airsweep("table", name, "--store", store, "--format", "json")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def children(store: Path, name: str) -> list[Any]:
    """The child runs of a sweep, from MLflow's own file."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("air/default")
    wanted = f"tags.`air.sweep` = '{name}' and tags.`air.kind` = 'trial'"
    return list(client.search_runs([experiment.experiment_id], wanted, max_results=1000))


def all_runs(store: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("air/default")
    return list(client.search_runs([experiment.experiment_id], max_results=1000))
