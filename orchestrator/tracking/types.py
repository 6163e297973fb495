"""Data types of sweep runs and child runs, and the tracker's factory. Imports no MLflow.

The store and the event log are authoritative. MLflow is a view of them; `reconcile` sends all that
MLflow lacks. This module does not depend on Ray, the store or the trial code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.tracking_uri import ARTIFACTS, DATABASE, resolve_uri

if TYPE_CHECKING:
    from orchestrator.tracking._mlflow import MlflowTracker


# Environment of `serve_command`: no job runner beside the server, no telemetry.
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Kind = Literal["trial", "point"]  # a point is a setting over its seeds and splits


@dataclass
class Counts:
    """Numbers of runs that were sent to MLflow."""

    sent: int = 0  # outcomes that were missing or different
    present: int = 0  # outcomes that were unchanged
    settings: int = 0  # settings that were missing or different
    sweep: bool = False  # whether the sweep run itself was changed


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Metrics of a run. Accuracies and other shares are fractions, not percentages."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)  # one value per iteration
    interval: str = ""  # of a setting: kind of interval between _low and _high


@dataclass(frozen=True)
class DatasetUse:
    """A part of a dataset that a run reads. MLflow distinguishes the parts by their names."""

    name: str
    context: Literal["pool", "test"]
    digest: str  # of the whole dataset
    source: str  # a folder, or the origin of a dataset that airsweep knows


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """The run of a sweep, the parent of its trial runs and setting runs."""

    sweep: str
    project: str
    spec_hash: str
    note: str  # Markdown
    user: str
    commit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ChildRun:
    """A child of the sweep run: the outcome of a trial, or a setting over its trials.

    Times come from records, never from the clock, so an outcome that is sent twice has the same
    times and is stored once.

    Args:
        id: the slot of a trial or the point of a setting. Unique within the sweep and kind, and
            stable over resumes.
        content: identifies the computation: the key of a trial, a digest of a setting's trials.
        numbers: computes the metrics, which takes time for a setting; called only if MLflow lacks
            them.
        started: ms since the epoch, like `ended`. A running trial ends now.
        files: small files by name; each function is called only if MLflow lacks the files.
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
    datasets: Sequence[DatasetUse] = ()
    started: int
    ended: int
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


# ---------------------------------------------------------------- MLflow


def make_tracker(uri: str | None, *, store: Path, project: str) -> MlflowTracker:
    """Create the tracker for a tracking URI.

    Args:
        uri: `http(s)://...` of a server or `sqlite:///<file>`. Default: MLFLOW_TRACKING_URI, or a
            database in the store's folder if that is not set.
        store: the folder of the store.
        project: runs go to the experiment `air/<project>`.

    Raises:
        ValueError: the URI is not supported, or turns tracking off.
    """
    address, database = resolve_uri(uri, store)
    from orchestrator.tracking._mlflow import MlflowTracker  # seconds to import

    return MlflowTracker(address, project=project, database=database)


def serve_command(
    store: Path,
    host: str = "127.0.0.1",
    port: int = 5000,
    auth: bool = False,
    allowed_hosts: str | None = None,
) -> list[str]:
    """The command that starts an MLflow server over a store's database and artifacts.

    Run it with SERVER_ENVIRONMENT and in a new process group: MLflow's worker process keeps the
    port if only the main process is killed. Call `exposure.check_exposure` before.
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
