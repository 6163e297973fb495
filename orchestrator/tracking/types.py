"""The runs of a sweep as MLflow shows them, and where MLflow is. Imports no MLflow.

MLflow is a view. The store and the event log hold the truth, and `reconcile` sends whatever MLflow
lacks. Knows nothing of Ray, of the store or of how a trial runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.tracking_uri import ARTIFACTS, DATABASE, resolved

if TYPE_CHECKING:
    from orchestrator.tracking._mlflow import Mlflow


# For the environment of `serve_command`: no job runner beside the server, no telemetry.
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Status = Literal["FINISHED", "FAILED", "KILLED"]
Kind = Literal["trial", "point"]  # a point is a setting over its seeds and splits


@dataclass
class Counts:
    """What was sent to MLflow."""

    sent: int = 0  # outcomes that it lacked, or had otherwise
    present: int = 0  # outcomes that it had
    settings: int = 0  # settings that it lacked, or had otherwise
    sweep: bool = False  # whether anything of the sweep's own run was sent

    @property
    def nothing_sent(self) -> bool:
        return not (self.sent or self.settings or self.sweep)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Metrics of a run; shares are fractions, not percent."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, list[float]] = field(default_factory=dict)  # a value per iteration
    interval: str = ""  # of a setting: what _low and _high are


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """The run of a sweep, which has those of its trials and settings below it."""

    sweep: str
    project: str
    spec_hash: str
    note: str  # Markdown
    user: str
    commit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ChildRun:
    """A run below that of its sweep: the outcome of a trial, or a setting over its trials.

    Times come from records and never from the clock, so that an outcome that is sent twice is the
    same both times, and MLflow has it once.

    Args:
        id: unique within the sweep and kind, the same after a resume: a trial's slot, a setting's
            point.
        content: what its numbers are computed from: a trial's key, a digest of a setting's trials.
        numbers: called where MLflow lacks them only; those of a setting take time to compute.
        started: ms since the epoch, as `ended`.
        files: small ones, by their names; called where MLflow lacks them only.
    """

    kind: Kind
    id: str
    content: str
    name: str
    status: Status = "FINISHED"
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    numbers: Callable[[], Numbers] = Numbers
    note: str = ""  # Markdown
    started: int
    ended: int
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


# ---------------------------------------------------------------- where MLflow is


def make_tracker(uri: str | None, *, store: Path, project: str) -> Mlflow:
    """MLflow at an address.

    Args:
        uri: `http(s)://...` of a server or `sqlite:///<file>`. None: MLFLOW_TRACKING_URI, and
            without it a database in the store's folder.
        store: the folder of the store.
        project: runs go to the experiment `air/<project>`.

    Raises:
        ValueError: the URI is of another kind, or switches tracking off.
    """
    address, database = resolved(uri, store)
    from orchestrator.tracking._mlflow import Mlflow  # seconds to import

    return Mlflow(address, project=project, database=database)


def serve_command(
    store: Path,
    host: str = "127.0.0.1",
    port: int = 5000,
    auth: bool = False,
    allowed_hosts: str | None = None,
) -> list[str]:
    """The command that shows a store's runs: an MLflow server over its database and artifacts.

    Run it with SERVER_ENVIRONMENT and in its own process group: killed alone, it leaves its worker
    on the port. Away from the loopback, ask `exposure` first.
    """
    folder = store.resolve()
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / DATABASE}"),
        *("--serve-artifacts", "--artifacts-destination", str(folder / ARTIFACTS)),
        *(("--app-name", "basic-auth") if auth else ()),
        *(("--allowed-hosts", allowed_hosts) if allowed_hosts else ()),
    ]
