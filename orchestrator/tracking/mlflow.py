"""The tracker that writes to MLflow; no other file of the product imports it.

One writer, on the driver. Every call names the run that it means, so a run id in the environment
captures nothing. A server that does not answer never stops a sweep: what could not be told is kept
and told later, and the next start tells everything anyway.
"""

# ruff: noqa: E402  (MLflow reads these settings when it is imported)
from __future__ import annotations

import os

for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # else alembic counts its migrations on stderr
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the defaults wait four minutes in an outage
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(_name, _value)
# Not a default: stdout belongs to our own output, and MLflow prints two lines a run there.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

import contextlib
import logging
import re
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from orchestrator.tracking import (
    ARTIFACTS,
    DATABASE,
    Point,
    Status,
    SweepRun,
    TrialRun,
    small_artifacts,
    without_credentials,
)

logging.getLogger("mlflow").setLevel(logging.WARNING)  # Ray may have imported it before us
log = logging.getLogger(__name__)

# Seconds between two attempts to reach a server that did not answer. One that accepts a call and
# never replies holds the driver for 35 seconds each time.
REST = 300.0
MAX_TAG = 8000  # characters
BATCH = 1000  # metrics a call
VIEW = "?workflowType=machine_learning"  # without it the pages of a run are those for prompts

REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
Trouble = (MlflowException, OSError)  # requests' exceptions are OSErrors


@dataclass
class _Child:
    """What MLflow holds of one outcome."""

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


@dataclass
class _Opened:
    """A sweep's parent, reached through a client, and what is known to be below it."""

    client: MlflowClient
    experiment: str
    parent: str
    folder: str
    children: dict[str, _Child]  # by slot


class MlflowTracker:
    """Sweeps as parents, outcomes as children, in the experiment `air/<project>`.

    Args:
        uri: of a server, or of a sqlite file.
        project: the second half of the experiment's name.
        database: the sqlite file. Artifacts then lie in a folder beside it, under addresses that do
            not name that folder, so that the two can be moved. None: the server keeps them.
    """

    def __init__(self, uri: str, *, project: str, database: Path | None) -> None:
        self._uri = uri
        self._place = without_credentials(uri)
        self._project = project
        self._database = database
        self._sweep: SweepRun | None = None
        self._opened: _Opened | None = None  # None: not reached yet, or not since an outage
        self._untold: dict[str, TrialRun] = {}
        self._rest_until = self._uploads_rest_until = 0.0
        self._complained = False
        self._page = ""

    def start(self, run: SweepRun) -> str:
        self._sweep, self._opened, self._untold = run, None, {}
        self._rest_until = self._uploads_rest_until = 0.0
        self._catch_up()
        return self._opened.parent if self._opened else ""

    def trial(self, run: TrialRun) -> None:
        self._untold[run.slot] = run
        self._catch_up()

    def finish(self, status: Status, note: str, artifacts: dict[str, Path]) -> None:
        if status != "KILLED":  # who is being killed has no time to wait for a server that is away
            self._rest_until = self._uploads_rest_until = 0.0
        if not (self._catch_up() and self._close(status, note, artifacts)):
            log.warning(
                "MLflow at %s lacks the end of the sweep and %d of its outcomes; run the sweep "
                "again when it answers: it is told all, and nothing is computed twice",
                *(self._place, len(self._untold)),
            )

    def url(self) -> str:
        if self._database is None:
            return f"{self._place.rstrip('/')}/{self._page}"
        folder = self._database.parent
        if self._database.name == DATABASE:
            return f"`airsweep ui --store {folder}`, then http://127.0.0.1:5000/{self._page}"
        artifacts = f"--artifacts-destination {folder / ARTIFACTS}"
        return f"`mlflow server --backend-store-uri {self._uri} {artifacts}`"

    # Telling, and what to do when MLflow is away.

    def _catch_up(self) -> bool:
        """Tell what is untold, in order. False: MLflow fails, or has a moment ago."""
        if time.monotonic() < self._rest_until:
            return False
        with _urllib3_silenced():
            try:
                self._opened = self._opened or self._open()
                for slot, run in list(self._untold.items()):
                    self._tell_unless_refused(self._opened, run)
                    del self._untold[slot]
            except Trouble as trouble:
                self._no_answer(trouble)
                return False
        self._complained = False
        return True

    def _no_answer(self, trouble: Exception) -> None:
        # A call that failed may still have done its work: what is there is looked up again.
        self._opened = None
        self._rest_until = time.monotonic() + REST
        if not self._complained:
            log.warning(
                "MLflow at %s fails (%s); the sweep goes on, and what it misses is told later",
                *(self._place, _reason(trouble)),
            )
        self._complained = True

    def _tell_unless_refused(self, opened: _Opened, run: TrialRun) -> None:
        try:
            self._tell(opened, run)
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            # Bad data, not bad weather: trying again is no use, and others may pass.
            log.warning("MLflow refuses %s: %s", run.name, _reason(error))

    def _tell(self, opened: _Opened, run: TrialRun) -> None:
        client = opened.client
        child = opened.children.get(run.slot)
        if child is not None and not child.is_about(run):
            # An edited spec or a cleared store has put another computation into this slot. Params
            # cannot be changed and a history cannot hold two runs, so the child is a new one.
            client.delete_run(child.run_id)  # hidden, and can be restored
            del opened.children[run.slot]
            child = None
        if child is None:
            child = self._create(opened, run)
        if child.says(run, self._child_tags(run, run.artifacts)):
            return  # by the names of the files: to look at them may be to make them
        artifacts = small_artifacts(run.artifacts, run.name)
        told = self._child_tags(run, artifacts)
        if child.says(run, told):
            return
        if child.tags.get("air.artifacts") != told.get("air.artifacts"):
            uploaded = self._upload(opened, child.run_id, child.folder, artifacts)
            told = self._child_tags(run, uploaded)
        changed = {key: value for key, value in told.items() if child.tags.get(key) != value}
        params = {key: value for key, value in run.params.items() if key not in child.params}
        points = run.points()
        _log_batch(client, child.run_id, tags=changed, params=params, points=points)
        if run.failure_class is None and "air.failure_class" in child.tags:
            client.delete_tag(child.run_id, "air.failure_class")
            del child.tags["air.failure_class"]
        client.set_terminated(child.run_id, run.status, run.ended)
        child.tags.update(told)
        child.params.update(params)
        child.metrics.update(points)
        child.status, child.ended = run.status, run.ended

    def _create(self, opened: _Opened, run: TrialRun) -> _Child:
        # A killed driver leaves this much behind; the slot is how the next one finds it.
        identity = {
            "air.kind": "trial",
            "air.slot": run.slot,
            "air.trial_key": run.tags.get("air.trial_key", ""),
            MLFLOW_PARENT_RUN_ID: opened.parent,
        }
        created = opened.client.create_run(
            opened.experiment, run.started, _filled(identity), run.name
        )
        child = opened.children[run.slot] = _child(created)
        return child

    def _child_tags(self, run: TrialRun, artifacts: Mapping[str, Path]) -> dict[str, str]:
        assert self._sweep is not None
        ours = {
            "air.state": run.state,
            "air.failure_class": run.failure_class or "",
            "air.sweep": self._sweep.sweep,
            "air.artifacts": ", ".join(sorted(artifacts)),  # those that have arrived
            MLFLOW_RUN_NAME: run.name,
        }
        return _filled(run.tags | ours | _system_tags(self._sweep))

    # Opening and closing the parent.

    def _open(self) -> _Opened:
        assert self._sweep is not None, "start() comes first"
        sweep = self._sweep
        client = self._connect()
        experiment = self._experiment(client)
        identity = {"air.kind": "sweep", "air.sweep": sweep.sweep}
        about = {
            "air.project": sweep.project,
            "air.spec_hash": sweep.spec_hash,
            MLFLOW_RUN_NOTE: sweep.note,
        }
        sweeps = list(_search(client, experiment, "tags.`air.kind` = 'sweep'"))
        parents = [run for run in sweeps if run.data.tags.get("air.sweep") == sweep.sweep]
        for spare in parents[1:]:
            if spare.info.status == "RUNNING":  # a request whose reply was lost was sent again
                client.delete_run(spare.info.run_id)
        parent = next(iter(parents), None)
        if parent is None:
            parent = client.create_run(experiment, None, identity, sweep.sweep)
        elif parent.info.status != "RUNNING":
            client.update_run(parent.info.run_id, "RUNNING")
        new = {key: value for key, value in sweep.params.items() if key not in parent.data.params}
        parent_id = parent.info.run_id
        _log_batch(client, parent_id, tags=_filled(about | _system_tags(sweep)), params=new)
        children = _children(client, experiment, parent_id)
        self._page = f"#/experiments/{experiment}/runs/{parent_id}{VIEW}"
        return _Opened(client, experiment, parent_id, parent.info.artifact_uri, children)

    def _close(self, status: Status, note: str, artifacts: dict[str, Path]) -> bool:
        assert self._opened is not None
        opened, client = self._opened, self._opened.client
        with _urllib3_silenced():
            try:
                known = {child.run_id for child in opened.children.values()}
                below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{opened.parent}'"
                running = f"{below} and attributes.status = 'RUNNING'"
                for run in list(_search(client, opened.experiment, running)):
                    twin = opened.children.get(run.data.tags.get("air.slot", ""))
                    if twin is not None and run.info.run_id not in known:
                        client.delete_run(run.info.run_id)  # made twice by a retried request
                    else:
                        client.set_terminated(run.info.run_id, "KILLED")
                self._upload(
                    opened, opened.parent, opened.folder, small_artifacts(artifacts, "the sweep")
                )
                states = Counter(c.tags.get("air.state") for c in opened.children.values())
                counts = {f"air.{s}": str(states[s]) for s in ("done", "reused", "failed")}
                about = _filled({MLFLOW_RUN_NOTE: note}) | counts
                _log_batch(client, opened.parent, tags=about)
                client.set_terminated(opened.parent, status)
            except Trouble as trouble:
                self._no_answer(trouble)
                return False
        return True

    def _connect(self) -> MlflowClient:
        if self._database is None:
            return MlflowClient(self._uri)
        self._database.parent.mkdir(parents=True, exist_ok=True)
        # Of two processes that create one file at the same time, one fails half-way.
        with FileLock(f"{self._database}.lock", timeout=120):
            if not self._database.exists():
                _create_database(self._database)
            _check_database(self._database)
            return MlflowClient(self._uri)

    def _experiment(self, client: MlflowClient) -> str:
        name = f"air/{self._project}"
        found: Experiment | None = client.get_experiment_by_name(name)
        if found is None:
            location = None if self._database is None else f"mlflow-artifacts:/{_slug(name)}"
            kind = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return str(client.create_experiment(name, location, kind))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self._experiment(client)  # another sweep has just made it
        if found.lifecycle_stage == "deleted":
            log.warning("the experiment %s was deleted in MLflow; it is restored", name)
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    # Artifacts.

    def _upload(
        self, opened: _Opened, run_id: str, folder: str, artifacts: Mapping[str, Path]
    ) -> dict[str, Path]:
        """Bring artifacts to MLflow; return those that arrived.

        A server can be well and its artifact store not (no boto3, no room). Then numbers and states
        are told all the same, and the files with the next start.
        """
        arrived: dict[str, Path] = {}
        if time.monotonic() < self._uploads_rest_until:
            return arrived
        try:
            for name, path in artifacts.items():
                self._upload_one(opened.client, run_id, folder, name, path)
                arrived[name] = path
        except Trouble as trouble:
            self._uploads_rest_until = time.monotonic() + REST
            log.warning("MLflow takes no artifacts for now (%s)", _reason(trouble))
        return arrived

    def _upload_one(
        self, client: MlflowClient, run_id: str, folder: str, name: str, path: Path
    ) -> None:
        parts = urlsplit(folder)
        if self._database is not None and parts.scheme == "mlflow-artifacts":
            # Such an address is relative to the folder that a server is started with. The client
            # resolves it through a server only; there is none, so the file is put where one looks.
            target = self._database.parent / ARTIFACTS / parts.path.lstrip("/") / name
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
            client.log_artifact(run_id, str(named), None if below == "." else below)


def _children(client: MlflowClient, experiment: str, parent: str) -> dict[str, _Child]:
    children: dict[str, _Child] = {}
    below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'"
    for run in list(_search(client, experiment, below)):
        slot = run.data.tags.get("air.slot")
        if slot is None:
            continue  # not ours: somebody has hung a run of their own below the sweep
        child = _child(run)
        twin = children.setdefault(slot, child)
        if twin is not child:  # here too, requests are sent again
            children[slot], spare = (child, twin) if twin.status == "RUNNING" else (twin, child)
            client.delete_run(spare.run_id)
    return children


def _child(run: Run) -> _Child:
    return _Child(
        run_id=run.info.run_id,
        folder=run.info.artifact_uri,
        status=run.info.status,
        started=run.info.start_time,
        ended=run.info.end_time,
        tags=dict(run.data.tags),
        params=set(run.data.params),
        metrics=set(run.data.metrics),
    )


def _search(client: MlflowClient, experiment: str, query: str) -> Iterator[Run]:
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


def _log_batch(
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


def _system_tags(sweep: SweepRun) -> dict[str, str]:
    """What MLflow would find out by itself, had the driver a checkout and the worker a user."""
    return {
        MLFLOW_USER: sweep.user,
        MLFLOW_SOURCE_NAME: sweep.source,
        MLFLOW_SOURCE_TYPE: "JOB",
        MLFLOW_GIT_COMMIT: sweep.commit,
    }


def _filled(values: Mapping[str, str]) -> dict[str, str]:
    return {key: _cut(value) for key, value in values.items() if value}


def _cut(text: str) -> str:
    """A tag that MLflow takes; a note ends with a whole line."""
    if len(text) <= MAX_TAG:
        return text
    end = "\n\n*(cut)*"
    head = text[: MAX_TAG - len(end)]
    return (head.rpartition("\n")[0] or head) + end


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_/-]+", "-", name)


def _reason(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.rpartition("Caused by ")[2][:200]  # what a failed request has to say comes last


def _create_database(path: Path) -> None:
    """Whole or not at all: MLflow opens no file in which somebody was killed half-way."""
    half_made = f".{path.name}-new"
    for left in path.parent.glob(f"{half_made}*"):
        left.unlink()
    made = path.with_name(f"{half_made}-{uuid.uuid4().hex[:8]}")  # a client is kept by its address
    MlflowClient(f"sqlite:///{made}")
    made.replace(path)


def _check_database(path: Path) -> None:
    """MLflow would try a broken file for two minutes, and then raise something of sqlalchemy's."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error


@contextlib.contextmanager
def _urllib3_silenced() -> Iterator[None]:
    """It warns of every retry; we say once that there is an outage."""
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
