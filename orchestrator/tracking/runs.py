"""Runs as MLflow has them: searched, written in batches, with files and a database of their own.

What `mlflow` (the tracker) and readers of runs share. The settings that MLflow is used with are
here, so this comes before any other import of MLflow.
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
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import read_mlflow_creds
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from orchestrator.tracking import (
    ARTIFACTS,
    Point,
    PointRun,
    SeenRun,
    TrackerAway,
    TrialRun,
    without_credentials,
)

logging.getLogger("mlflow").setLevel(logging.WARNING)  # Ray may have imported it before us

MAX_TAG = 8000  # characters
BATCH = 1000  # metrics a call
RUN_ID = 32  # hex digits
UNKNOWN_USER, FORBIDDEN = 401, 403  # of HTTP
ROOM = 2 * 2**20  # bytes: an empty database of MLflow, with its journal
Trouble = (MlflowException, OSError)  # requests' exceptions are OSErrors


@dataclass
class Child:
    """What MLflow holds of one outcome, or of one setting."""

    run_id: str
    folder: str  # the uri of its artifacts
    status: str
    started: int
    ended: int | None
    tags: dict[str, str]
    params: set[str]
    metrics: set[str]

    def is_about(self, run: TrialRun) -> bool:
        """Whether these numbers and params may be completed with those of `run`."""
        if self.tags.get("air.trial_key") != run.tags.get("air.trial_key"):
            return False
        # A failed first attempt has no numbers, and its times are not those of the second.
        return not self.metrics or self.started == run.started or self.ended == run.ended

    def says(self, run: TrialRun, told: Mapping[str, str]) -> bool:
        """Whether there is nothing left to tell. The status is set last: with it, all is there."""
        return (
            (self.status, self.ended) == (run.status, run.ended)
            and all(self.tags.get(key) == value for key, value in told.items())
            and ("air.failure_class" in self.tags) == (run.failure_class is not None)
            and run.params.keys() <= self.params
            and run.points().keys() <= self.metrics
        )

    def computed(self, run: PointRun) -> bool:
        """Whether these are the numbers of `run`. The status is set last."""
        return self.status == "FINISHED" and self.tags.get("air.content") == run.content


@dataclass
class Below:
    """The children of a sweep."""

    trials: dict[str, Child]  # by slot
    points: dict[str, Child]  # settings, by their point

    def find(self, kind: str, name: str) -> Child | None:
        return {"trial": self.trials, "point": self.points}.get(kind, {}).get(name)

    def twin(self, run: Run) -> Child | None:
        """The child that is told where a run was made twice."""
        kind, name = _identity(run)
        child = self.find(kind, name)
        return child if child is not None and child.run_id != run.info.run_id else None


def _identity(run: Run) -> tuple[str, str]:
    """Kind and name of a child; runs that are not ours have no name."""
    tags = run.data.tags
    kind = tags.get("air.kind", "")
    return kind, tags.get("air.point" if kind == "point" else "air.slot", "")


def children_below(client: MlflowClient, experiment: str, parent: str) -> Below:
    found = Below({}, {})
    below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'"
    for run in list(search(client, experiment, below)):
        kind, name = _identity(run)
        if not name:
            continue  # not ours: somebody has hung a run of their own below the sweep
        child = child_of(run)
        named = found.points if kind == "point" else found.trials
        twin = named.setdefault(name, child)
        if twin is not child:  # here too, requests are sent again
            named[name], spare = (child, twin) if twin.status == "RUNNING" else (twin, child)
            client.delete_run(spare.run_id)
    return found


def child_of(run: Run) -> Child:
    return Child(
        run_id=run.info.run_id,
        folder=run.info.artifact_uri,
        status=run.info.status,
        started=run.info.start_time,
        ended=run.info.end_time,
        tags=dict(run.data.tags),
        params=set(run.data.params),
        metrics=set(run.data.metrics),
    )


def search(client: MlflowClient, experiment: str, query: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            query,
            max_results=1000,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def log_batch(
    client: MlflowClient,
    run_id: str,
    *,
    tags: Mapping[str, str],
    params: Mapping[str, str] | None = None,
    points: Mapping[str, Sequence[Point]] | None = None,
) -> None:
    metrics = [
        Metric(key, point.value, point.time, point.step)
        for key, series in (points or {}).items()
        for point in series
    ]
    first, rest = metrics[:BATCH], metrics[BATCH:]
    client.log_batch(
        run_id,
        metrics=first,
        params=[Param(key, value) for key, value in (params or {}).items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
        synchronous=True,  # an environment variable could make it a queue
    )
    for start in range(0, len(rest), BATCH):
        client.log_batch(run_id, metrics=rest[start : start + BATCH], synchronous=True)


def filled(values: Mapping[str, str]) -> dict[str, str]:
    return {key: _cut(value) for key, value in values.items() if value}


def _cut(text: str) -> str:
    """A tag that MLflow takes; a note ends with a whole line."""
    if len(text) <= MAX_TAG:
        return text
    end = "\n\n*(cut)*"
    head = text[: MAX_TAG - len(end)]
    return (head.rpartition("\n")[0] or head) + end


def contents(files: Mapping[str, Path]) -> str:
    """Names of files with digests of what is in them."""
    digests = {
        name: hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
        for name, path in sorted(files.items())
    }
    return ", ".join(f"{name} {digest}" for name, digest in digests.items())


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_/-]+", "-", name)


def reason(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    _, caused, cause = text.rpartition("(Caused by ")  # what a failed request has to say comes last
    return (cause.removesuffix(")") if caused else cause)[:200]


def why_barred(trouble: Exception, place: str, what: str) -> str | None:
    """Why a server that answers lets us not in, and what to do; None: it is another trouble.

    Args:
        place: the server, without credentials.
        what: was to be read or written.
    """
    if not isinstance(trouble, MlflowException):
        return None
    status = trouble.get_http_status_code()  # type: ignore[no-untyped-call]
    if status == UNKNOWN_USER:
        return (
            f"MLflow at {place} lets us not in ({reason(trouble)}); set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or write "
            "~/.mlflow/credentials"
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
        f"MLflow at {place} does not let {user} use {what} ({reason(trouble)}); who made it, "
        "or an administrator, grants EDIT (docs/team.md)"
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """It warns of every retry; we say once that there is an outage."""
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------- files of a run


def put_artifact(
    client: MlflowClient, database: Path | None, folder: str, name: str, path: Path
) -> None:
    """Bring a file to a run.

    Args:
        database: the sqlite file where no server stands between; artifacts are beside it.
        folder: the uri of the run's artifacts.
    """
    beside = _beside(database, folder)
    if beside is not None:
        target = beside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(path, partial)
        partial.replace(target)
        return
    with tempfile.TemporaryDirectory() as scratch:  # a file is uploaded under its own name
        named = Path(scratch, name)
        named.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, named)
        below = Path(name).parent.as_posix()
        # `client.log_artifact` would ask the server for the folder first.
        files = get_artifact_repository(folder, tracking_uri=client.tracking_uri)
        files.log_artifact(str(named), None if below == "." else below)  # type: ignore[no-untyped-call]


def _beside(database: Path | None, folder: str) -> Path | None:
    """Where a run's files lie beside a database; None: the client knows.

    The address is relative to the folder that a server is started with. The client resolves it
    through a server only; there is none, so a file is put where one looks.
    """
    parts = urlsplit(folder)
    if database is None or parts.scheme != "mlflow-artifacts":
        return None
    return database.parent / ARTIFACTS / parts.path.lstrip("/")


# ---------------------------------------------------------------- reading


def read_run(uri: str, database: Path | None, run_id: str, file: str) -> SeenRun:
    """A run by its id, or by the beginning of one, with the text of one of its files.

    Raises:
        ValueError: there is none, or there are several.
        TrackerAway: the server does not answer.
    """
    if database is not None and not database.exists():
        raise ValueError(f"{database} is not there: nothing was tracked in this store yet")
    client = MlflowClient(uri)
    with quiet():
        try:
            run = _find(client, run_id)
            return SeenRun(
                run_id=run.info.run_id,
                name=run.info.run_name,
                status=run.info.status,
                tags=dict(run.data.tags),
                metrics=dict(run.data.metrics),
                text=_text(client, database, run, file),
            )
        except Trouble as trouble:
            barred = why_barred(trouble, without_credentials(uri), f"the run {run_id}")
            if barred is not None:
                raise ValueError(barred) from trouble
            raise TrackerAway(f"MLflow does not answer ({reason(trouble)})") from trouble


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
    """What a small file of a run says; None: the run has no such file."""
    beside = _beside(database, run.info.artifact_uri)
    if beside is not None:
        return (beside / name).read_text() if (beside / name).is_file() else None
    if name not in {file.path for file in client.list_artifacts(run.info.run_id)}:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        return Path(client.download_artifacts(run.info.run_id, name, scratch)).read_text()
