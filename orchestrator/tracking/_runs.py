"""Low-level MLflow access: search, write and read runs, their artifacts, and the database file.

Configures MLflow through its environment variables, so import this module before any of MLflow.
"""

# ruff: noqa: E402  (MLflow reads these variables at import)
from __future__ import annotations

import os

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # otherwise alembic lists its migrations on stderr
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default MLflow retries for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
}
os.environ |= {**DEFAULTS, **os.environ}
# Not a default: stdout carries the output of airsweep, and MLflow prints two lines per run there.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

import contextlib
import errno
import hashlib
import logging
import math
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils import get_results_from_paginated_fn

from orchestrator.errors import TrackerUnreachable
from orchestrator.files import lock_mode
from orchestrator.tracking._child_runs import ChildRun, Numbers
from orchestrator.tracking.database import check_database
from orchestrator.tracking_uri import ARTIFACTS

logging.getLogger("mlflow").setLevel(logging.WARNING)  # Ray may have imported MLflow before

MAX_TAG = 8000  # characters
BATCH, PARAMS = 800, 100  # metrics and params per request, which may have 1000 in all
DENIED = (401, 403)  # HTTP status codes
DATABASE_BYTES = 2 * 2**20  # an empty MLflow database with its journal
MLFLOW_ERRORS = (MlflowException, OSError)  # requests' exceptions are OSErrors
IDENTITY = {"trial": "air.slot", "point": "air.point"}  # the tag with the id of a run, by kind


@dataclass
class StoredRun:
    """A run as stored in MLflow.

    Attributes:
        sent: the curves that this process sent of a running trial; None for any other run.
    """

    run_id: str
    artifact_uri: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]  # last values
    sent: Mapping[str, Sequence[float]] | None = None

    @property
    def name(self) -> tuple[str, str]:
        """Kind and id of a child run; the id is empty for a run that a user added."""
        kind = self.tags.get("air.kind", "")
        return kind, self.tags.get(IDENTITY.get(kind, ""), "")

    def is_complete(self, run: ChildRun) -> bool:
        same = self.status == run.status and self.tags.get("air.digest") == run.digest
        return same and run.status != "RUNNING"

    def starts(self, run: ChildRun) -> bool:
        """Whether `run` continues the curves that this process sent."""
        if self.sent is None:
            return False
        curves = run.numbers().curves  # a failed trial has none
        return all(curves.get(k, v)[: len(v)] == v for k, v in self.sent.items())


def stored_run(run: Run) -> StoredRun:
    info = run.info
    return StoredRun(
        info.run_id, info.artifact_uri, info.status, dict(run.data.tags), dict(run.data.metrics)
    )


def search(client: MlflowClient, experiment: str, query: str) -> list[StoredRun]:
    """All runs that match a query, oldest first."""
    oldest = ["attributes.start_time ASC"]
    runs = get_results_from_paginated_fn(
        lambda count, token: client.search_runs([experiment], query, 1, count, oldest, token), 1000
    )
    return [*map(stored_run, runs)]


def log_batch(
    client: MlflowClient,
    run_id: str,
    *,
    tags: Mapping[str, str],
    params: Mapping[str, str] | None = None,
    metrics: Sequence[Metric] = (),
) -> None:
    """Write tags, params and metrics of a run, in as few requests as MLflow allows."""
    settings = [Param(key, value) for key, value in (params or {}).items()]
    for number in range(max(-(-len(metrics) // BATCH), -(-len(settings) // PARAMS), 1)):
        client.log_batch(
            run_id,
            metrics=metrics[number * BATCH : (number + 1) * BATCH],
            params=settings[number * PARAMS : (number + 1) * PARAMS],
            tags=[] if number else [RunTag(key, value) for key, value in tags.items()],
            synchronous=True,  # overrides MLFLOW_ENABLE_ASYNC_LOGGING
        )


def metrics_of(numbers: Numbers, started: int, ended: int) -> list[Metric]:
    """All finite values with their step and timestamp.

    >>> loss = [2.0, math.nan, 1.0]
    >>> [(m.step, m.timestamp) for m in metrics_of(Numbers(curves={"loss": loss}), 0, 90)]
    [(0, 30), (2, 90)]
    """
    curves = {key: [value] for key, value in numbers.metrics.items()} | dict(numbers.curves)
    return [
        Metric(key, value, started + (ended - started) * (step + 1) // len(curve), step)
        for key, curve in curves.items()
        for step, value in enumerate(curve)
        if math.isfinite(value)
    ]


def valid_tags(values: Mapping[str, str]) -> dict[str, str]:
    """The tags that are not empty, cut to the length that MLflow accepts."""
    return {key: value[:MAX_TAG] for key, value in values.items() if value}


def digests_of(files: Mapping[str, bytes]) -> str:
    """The names of files, each followed by a digest of its content."""
    digests = {name: hashlib.blake2b(data, digest_size=6) for name, data in sorted(files.items())}
    return ", ".join(f"{name} {digest.hexdigest()}" for name, digest in digests.items())


def short_reason(error: Exception) -> str:
    """The cause of an error, in one short line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    _, caused, cause = text.rpartition("(Caused by ")  # a failed request ends with its cause
    return (cause.removesuffix(")") if caused else cause)[:200]


@contextlib.contextmanager
def explained_errors(address: str, resource: str) -> Iterator[None]:
    """Translate the exceptions of MLflow calls into exceptions with a readable message.

    Args:
        address: of MLflow, without credentials.
        resource: that the calls read or write, for the message.

    Raises:
        ValueError: MLflow denies access.
        TrackerUnreachable: MLflow does not answer, or fails.
    """
    retries = logging.getLogger("urllib3.connectionpool")  # warns of every retry
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        yield
    except MLFLOW_ERRORS as error:
        is_denied = isinstance(error, MlflowException) and error.get_http_status_code() in DENIED
        if is_denied:
            raise ValueError(
                f"MLflow at {address} denies access to {resource} ({short_reason(error)}); check "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, the permission EDIT, and "
                "the server's --allowed-hosts (docs/tracking.md)"
            ) from error
        raise TrackerUnreachable(
            f"MLflow at {address} does not answer ({short_reason(error)})"
        ) from error
    finally:
        retries.setLevel(level)


def connect(address: str, database: Path | None) -> MlflowClient:
    """A client of the server at an address, or of a database file, which is created."""
    os.environ |= {**DEFAULTS, **os.environ}  # again: `airsweep.run` restores the environment
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
        # If two processes create the same database at the same time, one of them fails.
        mode = lock_mode(database.parent)
        with FileLock(f"{database}.lock", timeout=120, mode=mode):
            if not database.exists():
                create_database(database)
            check_database(database)
    return MlflowClient(address)


def create_database(path: Path) -> None:
    """Create an MLflow database under a temporary name and rename it when it is complete.

    MLflow cannot open a database whose creation was interrupted.
    """
    prefix = f".{path.name}-new"
    for leftover in path.parent.glob(f"{prefix}*"):
        leftover.unlink()
    if shutil.disk_usage(path.parent).free < DATABASE_BYTES:  # MLflow would retry for two minutes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    # MLflow caches its connections by address, so each attempt needs a new name.
    temporary = path.with_name(f"{prefix}-{uuid.uuid4().hex[:8]}")
    MlflowClient(f"sqlite:///{temporary}")
    temporary.replace(path)


# ---------------------------------------------------------------- artifacts of a run


def artifact_repository(artifact_uri: str, tracking_uri: str) -> ArtifactRepository:
    """The artifact repository of a run.

    Args:
        artifact_uri: of the run. Through the server of a store it is a path on the server's
            machine, so the files go through the server.
    """
    _, own, path = artifact_uri.partition(f"/{ARTIFACTS}/")
    if own and artifact_uri.startswith("/") and not tracking_uri.startswith("sqlite:"):
        artifact_uri = f"mlflow-artifacts:/{path}"
    return get_artifact_repository(artifact_uri, tracking_uri=tracking_uri)
