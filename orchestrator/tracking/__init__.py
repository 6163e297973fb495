"""What a tracker is told about a sweep: one parent, and one child for every outcome.

A tracker is a view. The store and the ledger hold the truth, so whatever a tracker has missed is
told to it again by the next start. Knows nothing of Ray, of the store or of how a trial runs.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

MAX_METRICS = 30  # keys a child; the columns of a tracker's table are what makes it slow
MAX_ARTIFACT = 1_000_000  # bytes; images go by reference

DATABASE = "mlflow.db"  # both lie in the store's folder and move with it
ARTIFACTS = "mlartifacts"

# For the environment of `serve_command`: no job runner beside the server, nothing sent home.
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Point(NamedTuple):
    """One number of a trial: its place on a curve, when it was measured, and what it was."""

    step: int
    time: int  # ms since the epoch
    value: float


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """The parent: a sweep, by its name."""

    sweep: str
    project: str
    spec_hash: str
    note: str  # Markdown
    user: str
    commit: str
    source: str
    params: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """A child: what became of one (cell, point, seed).

    Times come from the record and never from the clock: an outcome that is told twice says the same
    twice, and a tracker can tell that it has it.
    """

    slot: str  # unique within the sweep, the same after a resume
    name: str
    state: Literal["done", "reused", "failed"]
    failure_class: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)  # a value per iteration
    started: int  # ms since the epoch
    ended: int
    artifacts: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = self.metrics.keys() | self.curves.keys()
        assert len(keys) <= MAX_METRICS, (
            f"{len(keys)} metric keys for {self.slot}, at most {MAX_METRICS}: "
            "numbers per class belong in an artifact"
        )
        assert self.state == "failed" or not self.failure_class, (
            f"{self.slot} is {self.state} and has the failure class {self.failure_class}"
        )
        for key, curve in self.curves.items():
            last = curve[-1] if curve else math.nan
            metric = self.metrics.get(key, last)
            assert metric == last or math.isnan(metric) or math.isnan(last), (
                f"{key} of {self.slot} is {metric}, but its curve ends at {last}"
            )

    @property
    def status(self) -> Status:
        return "FAILED" if self.state == "failed" else "FINISHED"

    def points(self) -> dict[str, list[Point]]:
        """All numbers with step and time; what is not finite is left out.

        >>> run = TrialRun(slot="s", name="n", state="done", started=0, ended=90,
        ...                metrics={"s": 3.0}, curves={"loss": [2.0, float("nan"), 1.0]})
        >>> run.points()["loss"]
        [Point(step=0, time=30, value=2.0), Point(step=2, time=90, value=1.0)]
        >>> run.points()["s"]
        [Point(step=0, time=90, value=3.0)]
        """
        curves = {key: [value] for key, value in self.metrics.items()}
        curves |= {key: curve for key, curve in self.curves.items() if curve}
        series = {
            key: [
                Point(
                    step, self.started + (self.ended - self.started) * (step + 1) // len(curve), v
                )
                for step, v in enumerate(curve)
                if math.isfinite(v)
            ]
            for key, curve in curves.items()
        }
        return {key: points for key, points in series.items() if points}


class Tracker(Protocol):
    """Where people look at sweeps. One writer at a time: the driver."""

    def start(self, run: SweepRun) -> str:
        """Open the sweep's parent, the one it had before if there is one; return its id."""

    def trial(self, run: TrialRun) -> None:
        """Say what became of a trial. A slot is one child, however often it is told."""

    def finish(self, status: Status, note: str, artifacts: dict[str, Path]) -> None:
        """Close the parent, and whatever a killed driver has left open below it."""

    def url(self) -> str:
        """Where to look, for people."""


class NoTracker:
    """Tracking switched off: the store, the ledger and the tables are all there is."""

    def start(self, run: SweepRun) -> str:
        return ""

    def trial(self, run: TrialRun) -> None: ...

    def finish(self, status: Status, note: str, artifacts: dict[str, Path]) -> None: ...

    def url(self) -> str:
        return "nowhere: tracking is off"


def make_tracker(uri: str | None, *, store: Path, project: str) -> Tracker:
    """The tracker that a sweep asked for.

    Args:
        uri: `http(s)://...` of an MLflow server, `sqlite:///<file>`, `jsonl:<file>` or `none`.
            None: MLFLOW_TRACKING_URI, and without it a database in the store's folder.
        store: the folder of the store.
        project: runs go to the experiment `air/<project>`.

    Raises:
        ValueError: the uri is of another kind.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.resolve() / DATABASE}"
    scheme, _, rest = uri.partition(":")
    match scheme:
        case "none":
            return NoTracker()
        case "jsonl" if rest:
            from orchestrator.tracking.jsonl import JsonlTracker

            return JsonlTracker(Path(rest).absolute(), project=project)
        case "http" | "https":
            from orchestrator.tracking.mlflow import MlflowTracker  # seconds to import

            return MlflowTracker(uri, project=project, database=None)
        case "sqlite" if rest.startswith("///") and rest != "///":
            from orchestrator.tracking.mlflow import MlflowTracker

            database = Path(rest.removeprefix("///")).absolute()
            return MlflowTracker(f"sqlite:///{database}", project=project, database=database)
    raise ValueError(_unknown(scheme, uri))


def _unknown(scheme: str, uri: str) -> str:
    # Only the scheme is repeated: a database's address often holds a password.
    known = "known: http(s)://<server>, sqlite:///<file>, jsonl:<file>, none"
    if scheme in ("postgresql", "mysql", "mssql") or scheme.startswith(("postgresql+", "mysql+")):
        return (
            f"the tracking uri is a {scheme} database, which only a server should write to: run "
            f"`mlflow server --backend-store-uri ...` and give its http address; {known}"
        )
    if scheme == "file" or ":" not in uri:
        return (
            "the tracking uri is a folder, and MLflow no longer keeps runs in folders; "
            f"give sqlite:///<file> instead; {known}"
        )
    return f"unknown tracking uri {scheme}:...; {known}"


def serve_command(store: Path, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that shows a store's runs: a real MLflow server over its database and artifacts.

    Run it with SERVER_ENVIRONMENT and in its own process group: killed alone, it leaves its worker
    on the port. Away from the loopback, MLflow also wants `--allowed-hosts`.
    """
    folder = store.resolve()
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / DATABASE}"),
        *("--serve-artifacts", "--artifacts-destination", str(folder / ARTIFACTS)),
    ]


def small_artifacts(artifacts: Mapping[str, Path], owner: str) -> dict[str, Path]:
    """The artifacts that are there and small enough; a warning for each of the others."""
    small = {}
    for name, path in sorted(artifacts.items()):
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            log.warning("artifact %s of %s is not tracked: there is no file %s", name, owner, path)
        elif size >= MAX_ARTIFACT:
            log.warning(
                "artifact %s of %s is not tracked: it has %.1f MB, the limit is %.0f MB; see %s",
                *(name, owner, size / 1e6, MAX_ARTIFACT / 1e6, path),
            )
        else:
            small[name] = path
    return small


def without_credentials(uri: str) -> str:
    """
    >>> without_credentials("https://me:secret@mlflow.example.org:443/x")
    'https://mlflow.example.org:443/x'
    """
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri
