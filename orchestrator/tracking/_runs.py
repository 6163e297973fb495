"""Runs as MLflow has them: searched, written in batches, read, with their files and database.

Sets how MLflow is used, so this is imported before any other module of MLflow.
"""

# ruff: noqa: E402  (MLflow reads these settings when it is imported)
from __future__ import annotations

import os

for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # else alembic counts its migrations on stderr
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the defaults wait four minutes in an outage
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
}.items():
    os.environ.setdefault(_name, _value)
# Not a default: stdout belongs to our own output, and MLflow prints two lines a run there.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

import contextlib
import errno
import hashlib
import logging
import math
import re
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import read_mlflow_creds

from orchestrator.errors import TrackerAway
from orchestrator.redact import without_credentials
from orchestrator.tracking.types import ChildRun, Numbers
from orchestrator.tracking_uri import ARTIFACTS, resolved

logging.getLogger("mlflow").setLevel(logging.WARNING)  # Ray may have imported it before us

MAX_TAG = 8000  # characters
BATCH = 1000  # metrics a call
RUN_ID = 32  # hex digits
UNKNOWN_USER, FORBIDDEN = 401, 403  # of HTTP
ROOM = 2 * 2**20  # bytes: an empty database of MLflow, with its journal
Trouble = (MlflowException, OSError)  # requests' exceptions are OSErrors
# The tags that say which run this is, and which computation its numbers come from.
IDENTITY = {"trial": ("air.slot", "air.trial_key"), "point": ("air.point", "air.content")}


@dataclass
class StoredRun:
    """What MLflow holds of a run."""

    run_id: str
    folder: str  # the uri of its artifacts
    status: str
    started: int
    ended: int | None
    tags: dict[str, str]
    params: set[str]
    numbered: bool  # has metrics

    @property
    def name(self) -> tuple[str, str]:
        """Kind and id of a run below a sweep's."""
        kind = self.tags.get("air.kind", "")
        return kind, self.tags.get(IDENTITY[kind][0], "") if kind in IDENTITY else ""

    def is_about(self, run: ChildRun) -> bool:
        """Whether these numbers and params may be completed with those of `run`."""
        if self.tags.get(IDENTITY[run.kind][1], "") != run.content:
            return False
        # A failed first attempt has no numbers, and its times are not those of the second.
        return not self.numbered or self.started == run.started or self.ended == run.ended


def is_ours(run: StoredRun) -> bool:
    """Whether a run below a sweep's is of airsweep. Users may put their own there."""
    return bool(run.name[1])


def stored(run: Run) -> StoredRun:
    return StoredRun(
        run_id=run.info.run_id,
        folder=run.info.artifact_uri,
        status=run.info.status,
        started=run.info.start_time,
        ended=run.info.end_time,
        tags=dict(run.data.tags),
        params=set(run.data.params),
        numbered=bool(run.data.metrics),
    )


def search(client: MlflowClient, experiment: str, query: str) -> list[StoredRun]:
    """All runs that a query finds, the oldest first."""
    found: list[StoredRun] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            query,
            max_results=1000,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        found += map(stored, page)
        token = page.token
        if not token:
            return found


def log_batch(
    client: MlflowClient,
    run_id: str,
    *,
    tags: Mapping[str, str],
    params: Mapping[str, str] | None = None,
    metrics: Sequence[Metric] = (),
) -> None:
    client.log_batch(
        run_id,
        metrics=metrics[:BATCH],
        params=[Param(key, value) for key, value in (params or {}).items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
        synchronous=True,  # an environment variable could make it a queue
    )
    for start in range(BATCH, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH], synchronous=True)


def metrics_of(numbers: Numbers, started: int, ended: int) -> list[Metric]:
    """All numbers with step and time, without those that are not finite.

    >>> [(m.step, m.timestamp) for m in metrics_of(Numbers(curves={"loss": [2.0, 1.0]}), 0, 90)]
    [(0, 45), (1, 90)]
    """
    curves = {key: [value] for key, value in numbers.metrics.items()} | dict(numbers.curves)
    return [
        Metric(key, value, started + (ended - started) * (step + 1) // len(curve), step)
        for key, curve in curves.items()
        for step, value in enumerate(curve)
        if math.isfinite(value)
    ]


def filled(values: Mapping[str, str]) -> dict[str, str]:
    return {key: _cut(value) for key, value in values.items() if value}


def _cut(text: str) -> str:
    """A tag that MLflow takes; a note ends with a whole line."""
    if len(text) <= MAX_TAG:
        return text
    end = "\n\n*(cut)*"
    head = text[: MAX_TAG - len(end)]
    return (head.rpartition("\n")[0] or head) + end


def contents(files: Mapping[str, bytes]) -> str:
    """Names of files with digests of their contents."""
    digests = {name: hashlib.blake2b(data, digest_size=6) for name, data in sorted(files.items())}
    return ", ".join(f"{name} {digest.hexdigest()}" for name, digest in digests.items())


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_/-]+", "-", name)


def reason(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    _, caused, cause = text.rpartition("(Caused by ")  # what a failed request has to say comes last
    return (cause.removesuffix(")") if caused else cause)[:200]


@contextlib.contextmanager
def calls(place: str, what: str) -> Iterator[None]:
    """Explain what calls of MLflow raise.

    Args:
        place: MLflow, without credentials.
        what: is read or written.

    Raises:
        ValueError: MLflow answers and refuses us.
        TrackerAway: it does not answer, or fails.
    """
    retries = logging.getLogger("urllib3.connectionpool")  # warns of each; one warning is enough
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        yield
    except Trouble as trouble:
        refusal = _refusal(trouble, place, what)
        if refusal is not None:
            raise ValueError(refusal) from trouble
        raise TrackerAway(f"MLflow at {place} does not answer ({reason(trouble)})") from trouble
    finally:
        retries.setLevel(level)


def _refusal(trouble: Exception, place: str, what: str) -> str | None:
    """Why a server that answers refuses us, and what to do; None: it is another trouble."""
    if not isinstance(trouble, MlflowException):
        return None
    status = trouble.get_http_status_code()  # type: ignore[no-untyped-call]
    if status == UNKNOWN_USER:
        return (
            f"MLflow at {place} rejected the credentials ({reason(trouble)}); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or "
            "write ~/.mlflow/credentials"
        )
    if status != FORBIDDEN:
        return None
    if "Host header" in str(trouble):
        return (
            f"MLflow at {place} refuses the name by which it is reached; start it with "
            f"--allowed-hosts {urlsplit(place).netloc}"
        )
    user = read_mlflow_creds().username or "an unnamed user"
    return (
        f"MLflow at {place} does not let {user} use {what} ({reason(trouble)}); its owner or an "
        "administrator grants EDIT (docs/tracking.md)"
    )


def create_database(path: Path) -> None:
    """Whole or not at all: MLflow opens no file in which somebody was killed half-way."""
    half_made = f".{path.name}-new"
    for left in path.parent.glob(f"{half_made}*"):
        left.unlink()
    if shutil.disk_usage(path.parent).free < ROOM:  # it would try for two minutes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    made = path.with_name(f"{half_made}-{uuid.uuid4().hex[:8]}")  # a client is kept by its address
    MlflowClient(f"sqlite:///{made}")
    made.replace(path)


def check_database(path: Path) -> None:
    """MLflow would try a broken file for two minutes, and then raise something of sqlalchemy's."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error


# ---------------------------------------------------------------- files of a run


def files_of(database: Path | None, folder: str, tracking_uri: str) -> ArtifactRepository:
    """The files of a run.

    Args:
        database: the sqlite file where no server stands between; files lie beside it.
        folder: their address, which is relative to the folder that a server is started with. MLflow
            resolves it through a server only.
    """
    parts = urlsplit(folder)
    if database is not None and parts.scheme == "mlflow-artifacts":
        folder = (database.parent / ARTIFACTS / parts.path.lstrip("/")).as_uri()
    return get_artifact_repository(folder, tracking_uri=tracking_uri)


# ---------------------------------------------------------------- reading


def read_run(given: str | None, store: Path, run_id: str, file: str) -> tuple[Run, str | None]:
    """A run by its id, or by the beginning of one, with the text of one of its files.

    Args:
        given: a tracking URI, as of `make_tracker`.

    Returns:
        The text is None where the run has no such file.

    Raises:
        ValueError: there is none, or there are several; or tracking is off.
        TrackerAway: the server does not answer.
    """
    uri, database = resolved(given, store)
    if database is not None and not database.exists():
        raise ValueError(f"{database} is not there: nothing was tracked in this store yet")
    with calls(without_credentials(uri), f"the run {run_id}"):
        client = MlflowClient(uri)
        run = _find(client, run_id)
        return run, _text(client, database, run, file)


def _find(client: MlflowClient, run_id: str) -> Run:
    if len(run_id) == RUN_ID:
        try:
            return client.get_run(run_id)
        except MlflowException as trouble:
            if trouble.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = []
    else:
        ours = [
            e.experiment_id for e in client.search_experiments(filter_string="name LIKE 'air/%'")
        ]
        query = f"attributes.run_id LIKE '{run_id}%'"
        found = list(client.search_runs(ours, query, max_results=2)) if ours else []
    if len(found) != 1:
        how_many = "several runs begin" if found else "no run begins"
        raise ValueError(f"{how_many} with {run_id!r} in MLflow; give the id that its page shows")
    return found[0]


def _text(client: MlflowClient, database: Path | None, run: Run, name: str) -> str | None:
    files = files_of(database, run.info.artifact_uri, client.tracking_uri)
    if name not in {file.path for file in files.list_artifacts()}:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        path = files.download_artifacts(name, scratch)  # type: ignore[no-untyped-call]
        return Path(path).read_text()
