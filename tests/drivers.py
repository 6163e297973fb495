"""Many drivers at once: each with a sweep of its own, all on one store and one team's services."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.sweeps import TIMEOUT, airsweep, environment, write_sweep
from tests.team import Team, basic

PROJECTS = ("north", "south")
SEARCH = """
grid: {{method: [zero_shot, air_fpl]}}
fixed: {{generator: "folder:{folder}", generation.block: 8, train.steps: 20}}
search:
  points: {points}
  width: 2
  storage: {studies}
  space:
    images_per_class: {{values: [4, 8, 16]}}
    fusion_weight: {{min: 0.1, max: 0.9}}
seeds: [{seed}]
"""
ENDED = ("trial_done", "trial_reused", "trial_failed", "trial_pruned")
AT_ONCE = 4  # drivers that start side by side: to import is what is slow


@dataclass
class Figures:
    """What came out of it."""

    drivers: int
    alive: int = 0  # of the drivers, when all could begin
    codes: Counter[int] = field(default_factory=Counter)  # exit codes
    expected: int = 0  # outcomes that the ledgers have
    late: int = 0  # of them, without a run in MLflow when the drivers had ended
    lost: int = 0  # the same, after `mlflow reconcile` where a driver says so
    doubled: int = 0
    open_runs: int = 0  # that are not FINISHED
    load: float = 0.0  # the machine's highest
    wall: float = 0.0  # seconds from the moment when all could begin
    connections: dict[str, int] = field(default_factory=dict)  # most at once, by user
    http: int = 0  # most connections that one driver had to the server
    rss: list[float] = field(default_factory=list)  # MB of each driver
    private: list[float] = field(default_factory=list)
    pages: dict[str, list[float]] = field(default_factory=dict)  # seconds, by phase
    refused: int = 0  # pages that the server could not give


def page_data(services: Team, user: dict[str, str], project: str) -> Callable[[], None]:
    """Asks what MLflow's list of runs asks when it opens."""
    asked = {"filter": f"name = 'air/{project}'", "max_results": 1}
    who = (user["MLFLOW_TRACKING_USERNAME"], user["MLFLOW_TRACKING_PASSWORD"])
    found = services.mlflow.post("ajax-api/2.0/mlflow/experiments/search", asked, *who)
    experiment = found["experiments"][0]["experiment_id"]
    runs = {
        "experiment_ids": [experiment],
        "run_view_type": "ACTIVE_ONLY",
        "max_results": 100,
        "order_by": ["attributes.start_time DESC"],
    }
    address = f"{services.mlflow.url}/ajax-api/2.0/mlflow/experiments/get?experiment_id="
    about = urllib.request.Request(f"{address}{experiment}", headers={"Authorization": basic(*who)})

    def ask() -> None:
        with urllib.request.urlopen(about, timeout=120) as answer:
            answer.read()
        services.mlflow.post("ajax-api/2.0/mlflow/runs/search", runs, *who)

    return ask


@contextmanager
def watched(work: Callable[[], None], every: float) -> Iterator[None]:
    """Do something again and again beside the block."""
    over = threading.Event()

    def again() -> None:
        while not over.wait(every):
            work()

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def seconds_of(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def drive(
    services: Team,
    drivers: int,
    folder: Path,
    images: Path,
    *,
    points: int = 5,
    trial_seconds: float = 0.5,
    apart: float = 0.0,
    address: str | None = None,
    looks: int = 20,
    say: Callable[[str], None] = lambda line: None,
    meanwhile: Callable[[Team, dict[str, str], str], None] = lambda *of: None,
) -> Figures:
    """Start drivers, let them begin together once all are there, and compare MLflow with ledgers.

    Args:
        images: ready ones, that no trial looks at.
        apart: seconds between the first trials of two drivers.
        address: of the Ray cluster that all join; None: none.
        looks: how often the page's data is asked for afterwards, to compare.
        meanwhile: done once while the drivers run.
    """
    found = Figures(drivers)
    gate, store = folder / "gate", folder / "runs"
    gate.mkdir(parents=True)
    users = {}
    experiments = {name: services.mlflow.make_experiment(f"air/{name}") for name in PROJECTS}
    for number in range(drivers):
        project = PROJECTS[number % len(PROJECTS)]
        users[number] = services.mlflow.make_user(f"user{number}")
        services.mlflow.grant(f"user{number}", experiments[project], "EDIT")
    ask = page_data(services, users[0], PROJECTS[0])
    more = {
        "PGPASSWORD": services.passwords["airsweep_studies"],
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # as docs/team.md says
        "AIRSWEEP_GATE": str(gate),
        "AIRSWEEP_TRIAL_SECONDS": str(trial_seconds),
        **({"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"} if address else {}),
    }

    def connections() -> None:
        for user, number in services.postgres.connections().items():
            found.connections[user] = max(number, found.connections.get(user, 0))

    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        stack.callback(lambda: [process.kill() for process in running if process.poll() is None])
        stack.enter_context(watched(connections, 0.2))
        for number in range(drivers):
            body = SEARCH.format(
                folder=images, points=points, studies=services.studies, seed=number + 1
            )
            project = PROJECTS[number % len(PROJECTS)]
            spec = write_sweep(folder, f"sweep{number}", f"project: {project}\n{body}")
            command = [sys.executable, "-m", "tests.trivial", "run", str(spec)]
            with (folder / f"driver{number}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        [*command, "--store", str(store)],
                        env=environment(
                            **more,
                            **users[number],
                            AIRSWEEP_GATE_SECONDS=str(apart * number),
                        ),
                        stdout=log,
                        stderr=log,
                    )
                )
            _until(lambda n=number: _ready(gate) > n - AT_ONCE, running, folder)
            if number % 10 == 9:
                say(f"{number + 1} drivers, load {os.getloadavg()[0]:.0f}")
        _until(lambda: _ready(gate) == drivers, running, folder)
        found.alive = sum(process.poll() is None for process in running)
        for process in running:
            memory = psutil.Process(process.pid).memory_full_info()
            found.rss.append(memory.rss / 1e6)
            found.private.append(memory.uss / 1e6)
        say(f"{found.alive} could begin; load {os.getloadavg()[0]:.0f}")
        found.pages = {"with": [], "without": []}
        began = time.monotonic()
        (gate / "open").touch()
        helper = threading.Thread(target=meanwhile, args=(services, users[0], PROJECTS[0]))
        helper.start()
        while any(process.poll() is None for process in running):
            assert time.monotonic() - began < TIMEOUT
            try:
                found.pages["with"].append(seconds_of(ask))
            except OSError as problem:  # of HTTP, too
                found.refused += 1
                say(f"no page: {problem}")
            found.load = max(found.load, os.getloadavg()[0])
            found.http = max(found.http, *(_to(services, one) for one in running))
            time.sleep(0.2)
        found.wall = time.monotonic() - began
        helper.join()
    found.codes = Counter(process.returncode for process in running)
    found.pages["without"] = [seconds_of(ask) for _ in range(looks)]
    for name in PROJECTS:
        _compare(found, services, store / "sweeps" / name, experiments[name])
    found.late = found.lost
    if found.late:
        for number in range(drivers):
            if "mlflow reconcile" in (folder / f"driver{number}.log").read_text():
                sweep = f"{PROJECTS[number % len(PROJECTS)]}/sweep{number}"
                airsweep("mlflow", "reconcile", sweep, "--store", store, **users[number])
        found.expected = found.lost = found.doubled = found.open_runs = 0
        for name in PROJECTS:
            _compare(found, services, store / "sweeps" / name, experiments[name])
    return found


def _ready(gate: Path) -> int:
    return len([file for file in gate.iterdir() if file.name != "open"])


def _until(
    true: Callable[[], bool], running: Sequence[subprocess.Popen[bytes]], folder: Path
) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not true():
        for number, process in enumerate(running):
            assert process.poll() is None, (folder / f"driver{number}.log").read_text()
        assert time.monotonic() < deadline, "drivers never began"
        time.sleep(0.1)


def _to(services: Team, process: subprocess.Popen[bytes]) -> int:
    """Connections of a driver to the server."""
    try:
        found = psutil.Process(process.pid).net_connections("tcp")
    except psutil.Error:
        return 0
    there = [c for c in found if c.raddr and c.raddr.port == services.mlflow.port]
    return len([c for c in there if c.status == psutil.CONN_ESTABLISHED])


def _compare(found: Figures, services: Team, sweeps: Path, experiment: str) -> None:
    """What ledgers have against what MLflow has."""
    told: Counter[tuple[str, str]] = Counter()
    token: str | None = ""
    while token is not None:
        asked: dict[str, Any] = {"experiment_ids": [experiment], "max_results": 1000}
        answer = services.mlflow.post(
            "api/2.0/mlflow/runs/search", {**asked, **({"page_token": token} if token else {})}
        )
        token = answer.get("next_page_token")
        for run in answer.get("runs", []):
            tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
            found.open_runs += run["info"]["status"] != "FINISHED"
            slot = {"sweep": "", "trial": tags.get("air.slot", "")}.get(tags["air.kind"])
            if slot is not None:
                told[tags["air.sweep"], slot] += 1
    for sweep in sweeps.iterdir():
        lines = (sweep / "events.jsonl").read_text().splitlines()
        slots = {e["slot"] for e in map(json.loads, lines) if e["event"] in ENDED} | {""}
        found.expected += len(slots)
        found.lost += sum(not told[sweep.name, slot] for slot in slots)
        found.doubled += sum(told[sweep.name, slot] > 1 for slot in slots)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below this share of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
