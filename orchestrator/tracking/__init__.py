"""The runs of a sweep as MLflow shows them, and where MLflow is. Imports no MLflow.

MLflow is a view. The store and the event log hold the truth, and `orchestrator.reconcile` sends
whatever MLflow lacks. Knows nothing of Ray, of the store or of how a trial runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow import Mlflow

DATABASE = "mlflow.db"  # both lie in the store's folder and move with it
ARTIFACTS = "mlartifacts"

# For the environment of `serve_command`: no job runner beside the server, no telemetry.
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Status = Literal["FINISHED", "FAILED", "KILLED"]
Kind = Literal["trial", "point"]  # a point is a setting over its seeds and splits


class TrackerAway(RuntimeError):
    """MLflow does not answer, or fails. Before anything was started: exit code 3."""


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


def uri_of(uri: str | None, store: Path) -> str:
    """The tracking URI: as given, else MLFLOW_TRACKING_URI, else a file in the store's folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.resolve() / DATABASE}"


def kind_of(uri: str) -> Literal["none", "http", "sqlite"]:
    """Where a tracking URI leads; imports no MLflow.

    Raises:
        ValueError: nowhere.
    """
    scheme, _, rest = uri.partition(":")
    match scheme:
        case "none":
            return "none"
        case "http" | "https":
            return "http"
        case "sqlite" if rest.startswith("///") and rest != "///":
            return "sqlite"
    raise ValueError(_unknown(scheme, uri))


def _unknown(scheme: str, uri: str) -> str:
    # Only the scheme is repeated: a database's address often holds a password.
    known = "known: http(s)://<server>, sqlite:///<file>, none"
    if scheme == "jsonl":
        return (
            "the tracker that wrote lines of JSON was removed: use --tracking-uri none, and "
            f"`airsweep mlflow reconcile` fills any MLflow from the store later; {known}"
        )
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


def resolved(uri: str | None, store: Path) -> tuple[str, Path | None]:
    """MLflow's address and, where that is a file, its path.

    Raises:
        ValueError: the URI is of another kind, or switches tracking off.
    """
    uri = uri_of(uri, store)
    match kind_of(uri):
        case "none":
            raise ValueError("tracking is off here; give an MLflow with --tracking-uri")
        case "http":
            return uri, None
        case "sqlite":
            database = Path(uri.removeprefix("sqlite:///")).absolute()
            return f"sqlite:///{database}", database


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
    from orchestrator.tracking.mlflow import Mlflow  # seconds to import

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


def without_credentials(uri: str) -> str:
    """
    >>> without_credentials("https://me:secret@mlflow.example.org:443/x")
    'https://mlflow.example.org:443/x'
    """
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri
