"""The tracker: writes a sweep, its trials and its settings to MLflow.

Runs are found by their tags before they are made, so nothing is doubled however often it is sent.
Every call names its run, so a run id in the environment captures nothing. Any call may raise; the
caller then drops what it holds and opens the sweep again.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from orchestrator.tracking._runs import (  # first: it has the settings of MLflow
    IDENTITY,
    StoredRun,
    Trouble,
    calls,
    check_database,
    contents,
    create_database,
    files_of,
    filled,
    is_ours,
    log_batch,
    metrics_of,
    reason,
    search,
    slug,
    stored,
)

# isort: split
from mlflow import MlflowClient
from mlflow.entities import Experiment
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
from orchestrator.tracking.types import ChildRun, Counts, Status, SweepRun
from orchestrator.tracking_uri import ARTIFACTS, DATABASE

log = logging.getLogger(__name__)

# For the check before a run: a user without a server should know at once.
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# A server reports these with the same codes when its database is busy or a moment away.
BUSY = ("QueuePool limit", "deadlock detected", "terminating connection", "closed unexpectedly")


class Mlflow:
    """MLflow at one address, with the experiment `air/<project>`.

    Args:
        uri: of a server, or of a sqlite file.
        project: the second half of the experiment's name.
        database: the sqlite file. Artifacts then lie in a folder beside it, under addresses that do
            not name that folder, so that the two can be moved. None: the server keeps them.
    """

    def __init__(self, uri: str, *, project: str, database: Path | None) -> None:
        self.place = without_credentials(uri)
        self.database = database
        self._uri, self._project, self._name = uri, project, f"air/{project}"

    def check(self) -> None:
        """Try to write to a server, quickly and before any work.

        Raises:
            ValueError: MLflow answers and refuses us.
            TrackerAway: it does not answer.
        """
        if self.database is not None:
            return
        with environment(QUICK), calls(self.place, f"the experiment {self._name}"):
            client = MlflowClient(self._uri)
            found = client.get_experiment_by_name(self._name)
            if found is None or found.lifecycle_stage == "deleted":
                return
            try:  # a user who may read an experiment may not always write to it
                client.set_experiment_tag(found.experiment_id, "air.project", self._project)
            except MlflowException as error:
                # Of two drivers that write a tag for the first time, one gets an error.
                if error.error_code not in REFUSED:
                    raise

    def open(self, sweep: SweepRun, *, live: bool = True) -> SweepTracker:
        """Find or make the run of a sweep, and find the runs below it.

        Args:
            live: the sweep runs now. Else a run that has ended stays so.

        Raises:
            ValueError, TrackerAway: as of `check`.
        """
        with calls(self.place, f"the experiment {self._name}"):
            client = self._connect()
            experiment = self._experiment(client)
            query = f"tags.`air.kind` = 'sweep' and tags.`air.sweep` = '{sweep.sweep}'"
            found = search(client, experiment, query)
            for spare in found[1:]:
                if spare.status == "RUNNING":  # a request was sent again after its reply was lost
                    client.delete_run(spare.run_id)
            tags = {"air.kind": "sweep", "air.sweep": sweep.sweep}
            run = found[0] if found else None
            run = run or stored(client.create_run(experiment, None, tags, sweep.sweep))
            opened = SweepTracker(self, client, experiment, sweep, run, Counts(sweep=not found))
            opened.begin(live)
            return opened

    def url(self, page: str) -> str:
        """Where people find a page."""
        if self.database is None:
            return f"{self.place.rstrip('/')}/{page}"
        folder = self.database.parent
        if self.database.name == DATABASE:
            return f"`airsweep ui --store {folder}`, then http://127.0.0.1:5000/{page}"
        artifacts = f"--artifacts-destination {folder / ARTIFACTS}"
        return f"`mlflow server --backend-store-uri {self._uri} {artifacts}`"

    def _connect(self) -> MlflowClient:
        if self.database is None:
            return MlflowClient(self._uri)
        self.database.parent.mkdir(parents=True, exist_ok=True)
        # Of two processes that create one file at the same time, one fails half-way.
        mode = lock_mode(self.database.parent)
        with FileLock(f"{self.database}.lock", timeout=120, mode=mode):
            if not self.database.exists():
                create_database(self.database)
            check_database(self.database)
            return MlflowClient(self._uri)

    def _experiment(self, client: MlflowClient) -> str:
        name = self._name
        found: Experiment | None = client.get_experiment_by_name(name)
        if found is None:
            location = None if self.database is None else f"mlflow-artifacts:/{slug(name)}"
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


@dataclass
class SweepTracker:
    """The run of a sweep, opened, and the runs below it."""

    mlflow: Mlflow
    client: MlflowClient
    experiment: str
    sweep: SweepRun
    run: StoredRun
    counts: Counts
    children: dict[tuple[str, str], StoredRun] = field(default_factory=dict)  # by kind and id
    takes_files: bool = True

    def begin(self, live: bool) -> None:
        """Bring the sweep's own run up to date, and find the runs below it."""
        if live and self.run.status != "RUNNING":
            self.client.update_run(self.run.run_id, "RUNNING")
            self.run.status = "RUNNING"
        about = {
            "air.project": self.sweep.project,
            "air.spec_hash": self.sweep.spec_hash,
            "air.user": self.sweep.user,
            MLFLOW_RUN_NOTE: self.sweep.note if live else "",
        }
        self._tag_sweep(about | self._system_tags())
        self.children = self._found()

    def _found(self) -> dict[tuple[str, str], StoredRun]:
        """The runs below the sweep's. Of two for one thing, as when a request was sent again after
        its reply was lost, one is deleted."""
        found: dict[tuple[str, str], StoredRun] = {}
        below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run.run_id}'"
        for child in filter(is_ours, search(self.client, self.experiment, below)):
            twin = found.setdefault(child.name, child)
            if twin is not child:
                kept, spare = (child, twin) if twin.status == "RUNNING" else (twin, child)
                found[child.name] = kept
                self.client.delete_run(spare.run_id)
        return found

    def send(self, run: ChildRun) -> bool:
        """Send what MLflow lacks of a trial or setting; return whether it lacked anything.

        Raises:
            ValueError, TrackerAway: as of `Mlflow.check`.
        """
        with calls(self.mlflow.place, f"the run {run.name}"):
            try:
                sent = self._send(run)
            except MlflowException as error:
                if error.error_code not in REFUSED or any(words in str(error) for words in BUSY):
                    raise
                # To send it again is no use, and others may pass.
                log.warning("MLflow refuses %s: %s", run.name, reason(error))
                sent = False
        if run.kind == "point":
            self.counts.settings += sent
        else:
            self.counts.sent += sent
            self.counts.present += not sent
        return sent

    def finish(
        self, status: Status, note: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """End the sweep's run, and the runs below it that a killed driver has left open.

        Args:
            note: Markdown; None: there is no time for note and files.

        Raises:
            ValueError, TrackerAway: as of `Mlflow.check`.
        """
        with calls(self.mlflow.place, f"the run {self.sweep.sweep}"):
            for run in self._found().values():
                if run.status == "RUNNING":
                    self.client.set_terminated(run.run_id, "KILLED")
                    self.counts.sweep = True
            tags = self._states()
            if note is not None:
                files = files or {}
                if self.run.tags.get("air.artifacts", "") != contents(files):
                    sent = self._upload(self.run, sorted(files.items()))
                    files = {name: files[name] for name in sent}
                tags |= {MLFLOW_RUN_NOTE: note, "air.artifacts": contents(files)}
            self._tag_sweep(tags)
            if self.run.status != status:
                self.client.set_terminated(self.run.run_id, status)
                self.run.status, self.counts.sweep = status, True

    def url(self) -> str:
        # Without the parameter, MLflow's page of a run is the one for prompts.
        runs = f"#/experiments/{self.experiment}/runs/{self.run.run_id}"
        return self.mlflow.url(f"{runs}?workflowType=machine_learning")

    def _states(self) -> dict[str, str]:
        trials = [child for (kind, _), child in self.children.items() if kind == "trial"]
        states = Counter(child.tags.get("air.state") for child in trials)
        named = ["done", "reused", "failed", *(["pruned"] if states["pruned"] else [])]
        return {f"air.{state}": str(states[state]) for state in named}

    def _tag_sweep(self, tags: Mapping[str, str]) -> None:
        changed = {k: v for k, v in filled(tags).items() if self.run.tags.get(k) != v}
        if changed:
            log_batch(self.client, self.run.run_id, tags=changed)
            self.run.tags |= changed
            self.counts.sweep = True

    def _send(self, run: ChildRun) -> bool:
        client = self.client
        known = self.children.get((run.kind, run.id))
        if known is not None and not known.is_about(run):
            # Another computation is in this place: an edited spec, a cleared store, one more seed.
            # Params cannot change and a history cannot hold two runs, so this is a new run.
            client.delete_run(known.run_id)  # hidden, and can be restored
            del self.children[run.kind, run.id]
            known = None
        known = known or self._create(run)
        files = ", ".join(sorted(run.files))
        if known.tags.get("air.artifacts", "") != files:
            made = ((name, make()) for name, make in sorted(run.files.items()))
            files = ", ".join(self._upload(known, made))
        tags = filled({**run.tags, **self._child_tags(run), "air.artifacts": files})
        changed = {key: value for key, value in tags.items() if known.tags.get(key) != value}
        params = {key: value for key, value in run.params.items() if key not in known.params}
        # The status is set last: a run that has it has its numbers.
        ended = (known.status, known.ended) == (run.status, run.ended)
        recovered = "air.failure_class" in known.tags.keys() - tags.keys()
        if ended and not (changed or params or recovered):
            return False
        if ended:
            log_batch(client, known.run_id, tags=changed, params=params)
        else:
            numbers = run.numbers()
            changed |= filled({"air.interval": numbers.interval})
            metrics = metrics_of(numbers, run.started, run.ended)
            log_batch(client, known.run_id, tags=changed, params=params, metrics=metrics)
            client.set_terminated(known.run_id, run.status, run.ended)
            known.numbered |= bool(metrics)
            known.status, known.ended = run.status, run.ended
        if recovered:
            client.delete_tag(known.run_id, "air.failure_class")
            del known.tags["air.failure_class"]
        known.tags |= changed
        known.params |= params.keys()
        return True

    def _create(self, run: ChildRun) -> StoredRun:
        """A run with as much as the next driver needs to find it, should this one be killed."""
        named = zip(IDENTITY[run.kind], (run.id, run.content), strict=True)
        tags = {"air.kind": run.kind, **dict(named), MLFLOW_PARENT_RUN_ID: self.run.run_id}
        created = self.client.create_run(self.experiment, run.started, filled(tags), run.name)
        return self.children.setdefault((run.kind, run.id), stored(created))

    def _child_tags(self, run: ChildRun) -> dict[str, str]:
        # A record says who computed it, which counts more than who sends it now.
        made = {
            MLFLOW_USER: run.tags.get("air.user", ""),
            MLFLOW_GIT_COMMIT: run.tags.get("air.commit", ""),
        }
        ours = {
            "air.sweep": self.sweep.sweep,
            MLFLOW_RUN_NAME: run.name,
            MLFLOW_RUN_NOTE: run.note,
        }
        return ours | self._system_tags() | filled(made)

    def _system_tags(self) -> dict[str, str]:
        """What MLflow would find out by itself, had the driver a checkout and the worker a user."""
        return {
            MLFLOW_USER: self.sweep.user,
            MLFLOW_SOURCE_NAME: self.sweep.source,
            MLFLOW_SOURCE_TYPE: "JOB",
            MLFLOW_GIT_COMMIT: self.sweep.commit,
        }

    def _upload(self, run: StoredRun, files: Iterable[tuple[str, bytes]]) -> list[str]:
        """Bring small files to MLflow; return the names of those that need not be sent again.

        A server can work while its artifact store does not (no boto3, no room). Then numbers and
        states arrive all the same, and the files when the sweep is opened again.
        """
        done: list[str] = []
        there = files_of(self.mlflow.database, run.folder, self.client.tracking_uri)
        for name, data in files if self.takes_files else ():
            try:
                with tempfile.TemporaryDirectory(prefix="airsweep-") as scratch:
                    path = Path(scratch, name)
                    path.write_bytes(data)
                    there.log_artifact(str(path))  # type: ignore[no-untyped-call]
            except Trouble as trouble:
                self.takes_files = False
                log.warning("MLflow takes no artifacts for now (%s)", reason(trouble))
                break
            done.append(name)
        return done
