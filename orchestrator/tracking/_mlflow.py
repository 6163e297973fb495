"""MLflow tracker: writes sweep runs, setting runs and trial runs.

Before creating a run the tracker searches for it by its tags, so sending an outcome twice does not
duplicate it. Every call passes a run id explicitly, so MLFLOW_RUN_ID has no effect. Any call can
raise; the caller then discards its `SweepTracker` and opens the sweep again.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from orchestrator.tracking._runs import (  # first: it configures MLflow
    IDENTITY,
    MLFLOW_ERRORS,
    StoredRun,
    artifact_repository,
    create_database,
    dataset_input,
    digests_of,
    explained_errors,
    is_airsweep_run,
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
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from orchestrator.environment import environment
from orchestrator.files import lock_mode
from orchestrator.redact import without_credentials
from orchestrator.tracking.database import (
    EXPERIMENT_TAGS,
    artifact_location,
    check_database,
    page_of,
)
from orchestrator.tracking.types import ChildRun, Counts, Status, SweepRun
from orchestrator.tracking_uri import DATABASE

log = logging.getLogger(__name__)

# For the check before a run, which should fail quickly.
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
TEMPORARY = ("air.failure_class", "air.best_classifier")  # tags that a later run can lack
REJECTED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# A server whose database is busy or restarting uses the codes of REJECTED with these messages.
BUSY = ("QueuePool limit", "deadlock detected", "terminating connection", "closed unexpectedly")


class MlflowTracker:
    """MLflow tracker for the experiment `air/<project>`.

    Args:
        uri: of a server or an sqlite file.
        project: the second part of the experiment's name.
        database: the sqlite file, or None for a server. The artifacts lie in a folder beside the
            file. Both can be moved together.
    """

    def __init__(self, uri: str, *, project: str, database: Path | None) -> None:
        self.address = without_credentials(uri)
        self.database = database
        self._uri, self._project, self._name = uri, project, f"air/{project}"

    def check(self) -> None:
        """Try to write to a server, quickly and before any work.

        Raises:
            ValueError: MLflow denies access.
            TrackerUnreachable: MLflow does not answer.
        """
        if self.database is not None:
            return
        with environment(QUICK), explained_errors(self.address, f"the experiment {self._name}"):
            client = MlflowClient(self._uri)
            experiment = client.get_experiment_by_name(self._name)
            if experiment is None or experiment.lifecycle_stage == "deleted":
                return
            try:  # reading an experiment does not imply the permission to write
                client.set_experiment_tag(experiment.experiment_id, "air.project", self._project)
            except MlflowException as error:
                # If two drivers write a tag for the first time, one of them gets an error.
                if error.error_code not in REJECTED:
                    raise

    def open(self, sweep: SweepRun, *, live: bool = True) -> SweepTracker:
        """Find or create the run of a sweep, and find its child runs.

        Args:
            live: whether the sweep is running. If not, a run that has ended keeps its status.

        Raises:
            ValueError, TrackerUnreachable: see `check`.
        """
        with explained_errors(self.address, f"the experiment {self._name}"):
            client = self._connect()
            experiment = self._experiment(client)
            query = f"tags.`air.kind` = 'sweep' and tags.`air.sweep` = '{sweep.sweep}'"
            runs = search(client, experiment, query)
            for duplicate in runs[1:]:
                if duplicate.status == "RUNNING":  # created by a repeated request
                    client.delete_run(duplicate.run_id)
            tags = {"air.kind": "sweep", "air.sweep": sweep.sweep}
            run = runs[0] if runs else None
            run = run or stored_run(client.create_run(experiment, None, tags, sweep.sweep))
            tracker = SweepTracker(self, client, experiment, sweep, run, Counts(sweep=not runs))
            tracker.begin(live)
            return tracker

    def url(self, page: str) -> str:
        """The URL of an MLflow page, or the command that serves it."""
        if self.database is None:
            return f"{self.address.rstrip('/')}/{page}"
        folder = self.database.parent
        if self.database.name == DATABASE:
            return f"`airsweep ui --store {folder}`, then http://127.0.0.1:5000/{page}"
        return f"`mlflow ui --backend-store-uri {self._uri}`, then http://127.0.0.1:5000/{page}"

    def _connect(self) -> MlflowClient:
        if self.database is None:
            return MlflowClient(self._uri)
        self.database.parent.mkdir(parents=True, exist_ok=True)
        # If two processes create the same database at the same time, one of them fails.
        mode = lock_mode(self.database.parent)
        with FileLock(f"{self.database}.lock", timeout=120, mode=mode):
            if not self.database.exists():
                create_database(self.database)
            check_database(self.database)
            return MlflowClient(self._uri)

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
        if experiment.lifecycle_stage == "deleted":
            log.warning("the experiment %s was deleted in MLflow; it is restored", name)
            client.restore_experiment(experiment.experiment_id)
        for key, value in EXPERIMENT_TAGS.items():
            if experiment.tags.get(key) != value:  # another client made the experiment
                client.set_experiment_tag(experiment.experiment_id, key, value)
        return str(experiment.experiment_id)


@dataclass
class SweepTracker:
    """A sweep run and its child runs."""

    mlflow: MlflowTracker
    client: MlflowClient
    experiment: str
    sweep: SweepRun
    run: StoredRun
    counts: Counts
    children: dict[tuple[str, str], StoredRun] = field(default_factory=dict)  # by kind and id
    accepts_files: bool = True

    def begin(self, live: bool) -> None:
        """Update the sweep run, and find its child runs."""
        if live and self.run.status != "RUNNING":
            self.client.update_run(self.run.run_id, "RUNNING")
            self.run.status = "RUNNING"
        tags = {
            "air.project": self.sweep.project,
            "air.spec_hash": self.sweep.spec_hash,
            "air.user": self.sweep.user,
            MLFLOW_RUN_NOTE: self.sweep.note if live else "",
        }
        self._tag_sweep(tags | self._system_tags())
        self.children = self._find_children()

    def _find_children(self) -> dict[tuple[str, str], StoredRun]:
        """The child runs by kind and id.

        Deletes duplicates: MLflow creates a second run when a client repeats a request whose reply
        was lost.
        """
        children: dict[tuple[str, str], StoredRun] = {}
        query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run.run_id}'"
        for child in filter(is_airsweep_run, search(self.client, self.experiment, query)):
            first = children.setdefault(child.name, child)
            if first is not child:
                keep, delete = (child, first) if first.status == "RUNNING" else (first, child)
                children[child.name] = keep
                self.client.delete_run(delete.run_id)
        return children

    def send(self, run: ChildRun) -> bool:
        """Send the parts of a trial or setting that MLflow lacks; return whether any were sent.

        Raises:
            ValueError, TrackerUnreachable: see `MlflowTracker.check`.
        """
        with explained_errors(self.mlflow.address, f"the run {run.name}"):
            try:
                sent = self._send(run)
            except MlflowException as error:
                if error.error_code not in REJECTED or any(words in str(error) for words in BUSY):
                    raise
                # Sending the same run again would fail again; other runs may be accepted.
                log.warning("MLflow rejects the run %s: %s", run.name, short_reason(error))
                sent = False
        if run.kind == "point":
            self.counts.settings += sent
        else:
            self.counts.sent += sent
            self.counts.present += not sent
        return sent

    def finish(
        self,
        status: Status,
        note: str | None = None,
        files: Mapping[str, bytes] | None = None,
        metrics: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """End the sweep run, and any child run that a killed driver left unfinished.

        Args:
            note: Markdown; None skips the note and the files, which take time to send.
            metrics, labels: metrics and tags of the sweep run.

        Raises:
            ValueError, TrackerUnreachable: see `MlflowTracker.check`.
        """
        with explained_errors(self.mlflow.address, f"the run {self.sweep.sweep}"):
            for run in self._find_children().values():
                if run.status == "RUNNING":
                    self.client.set_terminated(run.run_id, "KILLED")
                    self.counts.sweep = True
            tags = self._states() | dict(labels or {})
            if note is not None:
                files = files or {}
                if self.run.tags.get("air.artifacts", "") != digests_of(files):
                    sent = self._upload(self.run, sorted(files.items()))
                    files = {name: files[name] for name in sent}
                tags |= {MLFLOW_RUN_NOTE: note, "air.artifacts": digests_of(files)}
            self._tag_sweep(tags, metrics or {})
            if self.run.status != status:
                self.client.set_terminated(self.run.run_id, status)
                self.run.status, self.counts.sweep = status, True

    def url(self) -> str:
        return self.mlflow.url(page_of(self.experiment, self.run.run_id))

    def _states(self) -> dict[str, str]:
        trials = [child for (kind, _), child in self.children.items() if kind == "trial"]
        states = Counter(child.tags.get("air.state") for child in trials)
        return {f"air.{state}": str(states[state]) for state in ("done", "reused", "failed")}

    def _tag_sweep(self, tags: Mapping[str, str], metrics: Mapping[str, float] = {}) -> None:
        changed = {k: v for k, v in valid_tags(tags).items() if self.run.tags.get(k) != v}
        values = {k: v for k, v in metrics.items() if self.run.metrics.get(k) != v}
        if changed or values:
            now = int(time.time() * 1000)  # of several values MLflow shows the latest
            new = [Metric(key, value, now, 0) for key, value in values.items()]
            log_batch(self.client, self.run.run_id, tags=changed, metrics=new)
            self.run.tags |= changed
            self.run.metrics |= values
            self.counts.sweep = True

    def _send(self, run: ChildRun) -> bool:
        client = self.client
        stored = self.children.get((run.kind, run.id))
        if stored is not None and not stored.is_same_computation(run):
            # MLflow has another computation of this slot or point: the sweep was edited, the store
            # was cleared, or a seed was added. Params and metric histories cannot be replaced, so
            # a new run takes over.
            client.delete_run(stored.run_id)  # MLflow hides deleted runs and can restore them
            del self.children[run.kind, run.id]
            stored = None
        stored = stored or self._create(run)
        files = ", ".join(sorted(run.files))
        if stored.tags.get("air.artifacts", "") != files:
            contents = ((name, content()) for name, content in sorted(run.files.items()))
            files = ", ".join(self._upload(stored, contents))
        tags = valid_tags({**run.tags, **self._child_tags(run), "air.artifacts": files})
        changed = {key: value for key, value in tags.items() if stored.tags.get(key) != value}
        params = {key: value for key, value in run.params.items() if key not in stored.params}
        # The status is written last, so a run with a final status has all its metrics.
        ended = (stored.status, stored.ended) == (run.status, run.ended)
        inputs = [dataset_input(use) for use in run.datasets if use.name not in stored.inputs]
        outdated = [name for name in TEMPORARY if name in stored.tags.keys() - tags.keys()]
        if ended and not (changed or params or inputs or outdated):
            return False
        if inputs:
            client.log_inputs(stored.run_id, inputs)
        if ended:
            log_batch(client, stored.run_id, tags=changed, params=params)
        else:
            numbers = run.numbers()
            kinds = {"air.interval": numbers.interval, "air.classifier": numbers.classifier}
            changed |= valid_tags(kinds)
            sent = {name: len(values) for name, values in stored.curves.items()}
            metrics = metrics_of(numbers, run.started, run.ended)
            metrics = [metric for metric in metrics if metric.step >= sent.get(metric.key, 0)]
            log_batch(client, stored.run_id, tags=changed, params=params, metrics=metrics)
            stored.metrics |= {metric.key: metric.value for metric in metrics}
            self._set_status(stored, run)
        for name in outdated:
            client.delete_tag(stored.run_id, name)
            del stored.tags[name]
        stored.tags |= changed
        stored.params |= params.keys()
        stored.inputs |= {use.name for use in run.datasets}
        return True

    def _set_status(self, stored: StoredRun, run: ChildRun) -> None:
        if run.status == "RUNNING":
            stored.curves = {name: [*values] for name, values in run.numbers().curves.items()}
            if stored.status != "RUNNING":  # a trial that failed before
                self.client.update_run(stored.run_id, "RUNNING")
        else:
            self.client.set_terminated(stored.run_id, run.status, run.ended)
            stored.ended = run.ended
        stored.status = run.status

    def _create(self, run: ChildRun) -> StoredRun:
        """Create a run with the tags by which the next driver can find it."""
        identity = zip(IDENTITY[run.kind], (run.id, run.content), strict=True)
        tags = {"air.kind": run.kind, **dict(identity), MLFLOW_PARENT_RUN_ID: self.run.run_id}
        created = self.client.create_run(self.experiment, run.started, valid_tags(tags), run.name)
        return self.children.setdefault((run.kind, run.id), stored_run(created))

    def _child_tags(self, run: ChildRun) -> dict[str, str]:
        # The user and commit that computed the trial override those that send it.
        computed_by = {
            MLFLOW_USER: run.tags.get("air.user", ""),
            MLFLOW_GIT_COMMIT: run.tags.get("air.commit", ""),
        }
        tags = {
            "air.sweep": self.sweep.sweep,
            MLFLOW_RUN_NAME: run.name,
            MLFLOW_RUN_NOTE: run.note,
        }
        return tags | self._system_tags() | valid_tags(computed_by)

    def _system_tags(self) -> dict[str, str]:
        """The tags that MLflow sets itself in a process with a git checkout and a user name."""
        return {
            MLFLOW_USER: self.sweep.user,
            MLFLOW_SOURCE_NAME: self.sweep.source,
            MLFLOW_SOURCE_TYPE: "JOB",
            MLFLOW_GIT_COMMIT: self.sweep.commit,
        }

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
                    artifacts.log_artifact(str(path))  # type: ignore[no-untyped-call]
            except MLFLOW_ERRORS as error:
                self.accepts_files = False
                log.warning(
                    "MLflow does not accept artifacts at the moment (%s)", short_reason(error)
                )
                break
            uploaded.append(name)
        return uploaded
