"""MLflow tracker: writes sweep runs, setting runs and trial runs.

A run is written once. Its tag `air.digest` identifies its content, and its status is written last,
so a run with both is complete and is skipped. A running trial of this process is continued; any
other run of its slot is deleted and written anew. Every call passes a run id explicitly, so
MLFLOW_RUN_ID has no effect. Any call can raise as `MlflowTracker.check`; the caller then discards
its `SweepTracker` and opens the sweep again.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from orchestrator.tracking._runs import (  # first: it configures MLflow
    IDENTITY,
    MLFLOW_ERRORS,
    StoredRun,
    artifact_repository,
    connect,
    digests_of,
    explained_errors,
    log_batch,
    metrics_of,
    search,
    short_reason,
    stored_run,
    valid_tags,
)

# isort: split
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric
from mlflow.exceptions import MlflowException

from orchestrator.environment import environment
from orchestrator.redact import without_credentials
from orchestrator.tracking._child_runs import COMMIT, NOTE, PARENT, USER, ChildRun, Status
from orchestrator.tracking.database import EXPERIMENT_TAGS, artifact_location
from orchestrator.tracking_uri import resolve_uri

log = logging.getLogger(__name__)

# The tags of a sweep that its child runs have, too.
INHERITED = ("air.sweep", USER, COMMIT, "mlflow.source.name", "mlflow.source.type")

# For the check before a run, which should fail quickly.
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


class MlflowTracker:
    """MLflow tracker for the experiment `air/<project>`.

    Args:
        uri: `http(s)://...` of a server or `sqlite:///<file>`; see `resolve_uri`. The artifacts lie
            in a folder beside the file. Both can be moved together.
        store: folder of the store.

    Raises:
        ValueError: the URI is not supported, or turns tracking off.
    """

    def __init__(self, uri: str | None, store: Path, project: str) -> None:
        self._uri, self.database = resolve_uri(uri, store)
        self.address = without_credentials(self._uri)
        self._name = f"air/{project}"

    def check(self) -> None:
        """Try to read from a server, quickly and before any work.

        Raises:
            ValueError: MLflow denies access.
            TrackerUnreachable: MLflow does not answer.
        """
        if self.database is not None:
            return
        with environment(QUICK), explained_errors(self.address, f"the experiment {self._name}"):
            MlflowClient(self._uri).get_experiment_by_name(self._name)

    def open(self, sweep: Mapping[str, str], *, live: bool = True) -> SweepTracker:
        """Find or create the run of a sweep.

        Args:
            sweep: its tags.
            live: whether the sweep is running. If not, a run that has ended keeps its status.
        """
        with explained_errors(self.address, f"the experiment {self._name}"):
            client = connect(self._uri, self.database)
            experiment = self._experiment(client)
            name = sweep["air.sweep"]
            query = f"tags.`air.kind` = 'sweep' and tags.`air.sweep` = '{name}'"
            runs = search(client, experiment, query)
            for duplicate in runs[1:]:
                if duplicate.status == "RUNNING":  # created by a repeated request
                    client.delete_run(duplicate.run_id)
            tags = {"air.kind": "sweep", "air.sweep": name}
            run = runs[0] if runs else stored_run(client.create_run(experiment, None, tags, name))
            if live and run.status != "RUNNING":
                client.update_run(run.run_id, "RUNNING")
                run.status = "RUNNING"
            tracker = SweepTracker(self, client, experiment, sweep, run)
            tracker.tag(sweep if live else {**sweep, NOTE: ""})
            return tracker

    def _experiment(self, client: MlflowClient) -> str:
        name = self._name
        experiment: Experiment | None = client.get_experiment_by_name(name)
        if experiment is None:
            location = None if self.database is None else artifact_location(self.database, name)
            try:
                return str(client.create_experiment(name, location, EXPERIMENT_TAGS))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self._experiment(client)  # another driver has just created it
        for key, value in EXPERIMENT_TAGS.items():
            if experiment.tags.get(key) != value:  # another client made the experiment
                client.set_experiment_tag(experiment.experiment_id, key, value)
        return str(experiment.experiment_id)


@dataclass
class SweepTracker:
    """A sweep run and its child runs.

    Args:
        sweep: tags of the sweep run.
        sent: number of child runs that were written.
    """

    mlflow: MlflowTracker
    client: MlflowClient
    experiment: str
    sweep: Mapping[str, str]
    run: StoredRun
    sent: int = 0
    current: set[tuple[str, str]] = field(default_factory=set)  # kind and id of runs of this sweep
    accepts_files: bool = True

    @cached_property
    def children(self) -> dict[tuple[str, str], StoredRun]:
        """The child runs, by kind and id."""
        children: dict[tuple[str, str], StoredRun] = {}
        query = f"tags.`{PARENT}` = '{self.run.run_id}'"
        found = search(self.client, self.experiment, query)
        for child in sorted(found, key=lambda run: run.status == "RUNNING"):
            first = children.setdefault(child.name, child)
            # MLflow creates a second run when a client repeats a request whose reply was lost.
            if first is not child and child.name[1]:
                self.client.delete_run(child.run_id)
        return children

    def send(self, run: ChildRun) -> None:
        """Write a trial or setting, unless MLflow has it."""
        with explained_errors(self.mlflow.address, f"the run {run.name}"):
            stored = self.children.get((run.kind, run.id))
            self.current.add((run.kind, run.id))
            if stored is not None and stored.is_complete(run):
                return
            if stored is not None and not stored.starts(run):
                # MLflow hides deleted runs and can restore them.
                self.client.delete_run(stored.run_id)
                stored = None
            self._write(run, stored or self._create(run))
        self.sent += run.status != "RUNNING"

    def finish(
        self,
        status: Status,
        note: str | None = None,
        files: Mapping[str, bytes] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """End the sweep run, and any child run that a killed driver left unfinished.

        Args:
            note: Markdown; None skips the note and the files, which take time to send.
            metrics, tags: of the sweep run.
        """
        with explained_errors(self.mlflow.address, f"the run {self.sweep['air.sweep']}"):
            for run in self.children.values():
                if run.status == "RUNNING":
                    self.client.set_terminated(run.run_id, "KILLED")
                    run.status = "KILLED"
            changed, values = dict(tags or {}), dict(metrics or {})
            if note is not None:
                # What the sweep as last run does not have: MLflow cannot remove a metric.
                values |= dict.fromkeys(self.run.metrics.keys() - values.keys(), math.nan)
                for name in self.children.keys() - self.current:
                    self._unmark(self.children[name])
                files = files or {}
                if self.run.tags.get("air.artifacts", "") != digests_of(files):
                    sent = self._upload(self.run, sorted(files.items()))
                    files = {name: files[name] for name in sent}
                changed |= {NOTE: note, "air.artifacts": digests_of(files)}
            self.tag(changed, values)
            if self.run.status != status:
                self.client.set_terminated(self.run.run_id, status)
                self.run.status = status

    def tag(self, tags: Mapping[str, str], metrics: Mapping[str, float] = {}) -> None:
        """Write the tags and metrics of the sweep run that have changed."""
        changed = {k: v for k, v in valid_tags(tags).items() if self.run.tags.get(k) != v}
        values = {k: v for k, v in metrics.items() if self.run.metrics.get(k) != v}
        if changed or values:
            now = int(time.time() * 1000)  # of several values MLflow shows the latest
            new = [Metric(key, value, now, 0) for key, value in values.items()]
            log_batch(self.client, self.run.run_id, tags=changed, metrics=new)
            self.run.tags |= changed
            self.run.metrics |= values

    def _unmark(self, run: StoredRun) -> None:
        """Remove the mark of the best classifier, so that the run is written anew if it is sent."""
        if "air.best_classifier" in run.tags:
            for tag in ("air.best_classifier", "air.digest"):
                self.client.delete_tag(run.run_id, tag)

    def _create(self, run: ChildRun) -> StoredRun:
        """Create a run with its tags, by which the next driver can find it."""
        tags = {"air.kind": run.kind, IDENTITY[run.kind]: run.id, PARENT: self.run.run_id}
        tags |= self._tags(run)  # MLflow stores them in less time than by a later request
        created = self.client.create_run(self.experiment, run.started, valid_tags(tags), run.name)
        stored = self.children[run.kind, run.id] = stored_run(created)
        return stored

    def _write(self, run: ChildRun, stored: StoredRun) -> None:
        """Write what a new run or the run of a running trial lacks; its status last."""
        numbers, before = run.numbers(), stored.sent or {}
        is_running = run.status == "RUNNING"
        uploaded = self._upload(stored, ((k, content()) for k, content in run.files.items()))
        is_whole = not is_running and len(uploaded) == len(run.files)
        tags = {
            **self._tags(run),
            "mlflow.runName": run.name,
            "air.interval": numbers.interval,
            "air.classifier": numbers.classifier,
            "air.artifacts": ", ".join(sorted(uploaded)),
            "air.digest": run.digest if is_whole else "",
        }
        metrics = metrics_of(numbers, run.started, run.ended)
        changed = {k: v for k, v in valid_tags(tags).items() if stored.tags.get(k) != v}
        log_batch(
            self.client,
            stored.run_id,
            tags=changed,
            params=run.params if stored.sent is None else {},
            metrics=[
                metric for metric in metrics if metric.step >= len(before.get(metric.key, ()))
            ],
        )
        stored.sent = numbers.curves if is_running else None
        if not is_running:
            self.client.set_terminated(stored.run_id, run.status, run.ended)
        # A run whose files were refused is sent again by the next process, not by this one.
        stored.status, stored.tags = run.status, tags | {"air.digest": run.digest}

    def _tags(self, run: ChildRun) -> dict[str, str]:
        """The tags that are known before its numbers and files are sent."""
        # The user and commit that computed the trial override those that send it.
        own = {**run.tags, USER: run.tags.get("air.user"), COMMIT: run.tags.get("air.commit")}
        inherited = {name: self.sweep[name] for name in INHERITED}
        return inherited | {name: value for name, value in own.items() if value}

    def _upload(self, run: StoredRun, files: Iterable[tuple[str, bytes]]) -> list[str]:
        """Upload small files; return the names of the uploaded ones.

        The artifact store of a server can fail (no boto3, a full disk) while the server works. The
        runs are then written without files, which the next `open` of the sweep uploads.
        """
        uploaded: list[str] = []
        artifacts = artifact_repository(run.artifact_uri, self.client.tracking_uri)
        for name, data in files if self.accepts_files else ():
            try:
                with tempfile.TemporaryDirectory(prefix="airsweep-") as scratch:
                    path = Path(scratch, name)
                    path.write_bytes(data)
                    artifacts.log_artifact(str(path))
            except MLFLOW_ERRORS as error:
                self.accepts_files = False
                log.warning(
                    "MLflow does not accept artifacts at the moment (%s)", short_reason(error)
                )
                break
            uploaded.append(name)
        return uploaded
