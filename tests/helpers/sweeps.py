"""Runs real sweeps in processes of their own, for tests that look from outside."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from air_core.seal import sealed_json
from orchestrator.files import file_digest

TIMEOUT = 900  # seconds; a hang must not hang the tests, a busy machine must not fail them


# One cell with nothing to read, one that trains, and one that searches among counts of images.
SEARCH = """
grid: {{method: [zero_shot, {host}, air_{host}]}}
fixed: {{generator: "folder:{folder}", generation.block: {block}, train.steps: 20}}
search:
  points: 4
  width: 2
  pruning: {pruning}
  space:
    images_per_class: {{values: [4, 8, 16]}}
    fusion_weight: {{min: 0.1, max: 0.9}}
seeds: [1, 2]
resources: {{generator: {{actors: 1}}}}
"""


def search_sweep(folder: Path, block: int = 8, host: str = "fpl", pruning: str = "") -> str:
    """A small search over ready images.

    Args:
        folder: of the images.
        block: images that are encoded at a time.
        pruning: its settings; empty: every point runs to its end.
    """
    text = SEARCH if pruning else SEARCH.replace("  pruning: {pruning}\n", "")
    return text.format(folder=folder, block=block, host=host, pruning=pruning)


def many_trials(count: int) -> str:
    """A sweep of so many trials, each of which takes a moment."""
    rates = [round(0.001 * n, 3) for n in range(1, count + 1)]
    return f"""
grid: {{train.learning_rate: {rates}}}
fixed: {{method: fpl, train.steps: 200}}
seeds: [1]
"""


def wait_until(
    met: Callable[[], object], why: Callable[[], object] = lambda: "", every: float = 0.05
) -> None:
    """Wait for a condition, which is looked at `every` so many seconds; `why` explains afterwards
    what was there instead."""
    deadline = time.monotonic() + TIMEOUT
    while not met():
        assert time.monotonic() < deadline, why()
        time.sleep(every)


def write_sweep(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(f"version: 1\nname: {name}\n{body}")
    return file


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **more}


# Commands that start nothing. They run in this process: to start Python takes seconds.
LOOKS = ("cache", "init", "plan", "report", "status", "table", "usage", "validate")


def airsweep(
    *arguments: str | Path, check: bool = True, module: str = "orchestrator", **more: str
) -> subprocess.CompletedProcess[str]:
    """The command, or a module that takes its words, with `more` in its environment."""
    words = [*map(str, arguments)]
    if words[0] in LOOKS and module == "orchestrator" and not more:
        done = in_this_process(words)
    else:
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            capture_output=True,
            text=True,
            env=environment(**more),
            timeout=TIMEOUT,
            check=False,
        )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def in_this_process(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run airsweep here."""
    from orchestrator.__main__ import main

    said, complained, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(complained), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["airsweep", *words])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, said.getvalue(), complained.getvalue())


def run_and_kill_workers(
    spec: Path,
    store: Path,
    victims: Mapping[str, Callable[[list[dict[str, Any]]], bool]],
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """Run a sweep and kill -9 one process of Ray of each name as soon as what the ledger says
    since the start satisfies its condition."""
    before = len(events(store, spec.stem))
    store.mkdir(parents=True, exist_ok=True)
    said = (store / "stderr.txt").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(spec), "--store", str(store)],
        stdout=subprocess.DEVNULL,
        stderr=said,
        env=environment(**more),
    )
    deadline = time.monotonic() + TIMEOUT
    for name, when in victims.items():
        while not (
            when(events(store, spec.stem)[before:]) and (found := _workers(process.pid, name))
        ):
            assert process.poll() is None, f"ended before {name} could be killed"
            assert time.monotonic() < deadline, f"the moment to kill {name} never came"
            time.sleep(0.02)
        found[0].kill()
    code = process.wait(TIMEOUT)
    with said:
        said.seek(0)
        return subprocess.CompletedProcess(process.args, code, stderr=said.read())


def _workers(driver: int, name: str) -> list[psutil.Process]:
    """Below a driver, the processes of that name, or whose title begins with it."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if process.name() == name or process.cmdline()[0].startswith(name):
                found.append(process)
    return found


def events(store: Path, name: str) -> list[dict[str, Any]]:
    file = store / "sweeps" / "default" / name / "events.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")]


def count(found: list[dict[str, Any]], event: str, **fields: Any) -> int:
    return sum(
        one["event"] == event and all(one.get(k) == v for k, v in fields.items()) for one in found
    )


def begun_twice(log: Path, calm_log: Path) -> tuple[Counter[str], Counter[str]]:
    """What one sweep began more often than its undisturbed twin: trials, and what it prepares.
    Each counts what it begins by a line, and neither has a line that the other lacks.
    """
    began, calm = (Counter(file.read_text().splitlines()) for file in (log, calm_log))
    assert began.keys() == calm.keys(), log
    assert began >= calm, log
    trials: Counter[str] = Counter()
    prepared: Counter[str] = Counter()
    for line, times in (began - calm).items():
        (trials if line.startswith("trials/") else prepared)[line] = times
    return trials, prepared


def table(store: Path, name: str) -> list[dict[str, Any]]:
    done = airsweep("table", name, "--store", store, "--format", "json")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def children(store: Path, name: str) -> list[Any]:
    """The trials of a sweep, from MLflow's own file."""
    return all_runs(store, f"tags.`air.sweep` = '{name}' and tags.`air.kind` = 'trial'")


def all_runs(store: Path, query: str = "") -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("air/default")
    return list(client.search_runs([experiment.experiment_id], query, max_results=1000))


def record_again(folder: Path) -> None:
    """Make the record of an artifact fit its files, as if it had been made like this."""
    record = folder / "record.json"
    known = json.loads(record.read_text())
    known["files"] = {name: file_digest(folder / name) for name in known["files"]}
    record.write_bytes(sealed_json(known))
