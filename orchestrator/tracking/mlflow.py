"""The tracker that writes to MLflow; no other file of the product imports it.

One writer, on the driver. Every call names the run that it means, so a run id in the environment
captures nothing. A server that stops answering never stops a sweep: what could not be told is kept
and told later, or by `orchestrator.reconcile`, which tells everything anyway.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from orchestrator.tracking.runs import (  # first: it has the settings of MLflow
    Below,
    Child,
    Trouble,
    check_database,
    child_of,
    children_below,
    contents,
    create_database,
    filled,
    log_batch,
    put_artifact,
    quiet,
    reason,
    search,
    slug,
    why_barred,
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

from orchestrator.files import lock_mode
from orchestrator.tracking import (
    ARTIFACTS,
    DATABASE,
    MAX_UNTOLD,
    PointRun,
    Status,
    SweepRun,
    Told,
    TrackerAway,
    TrialRun,
    linked,
    series,
    small_artifacts,
    without_credentials,
)
from orchestrator.variables import environment

log = logging.getLogger(__name__)

# Seconds between two attempts to reach a server that did not answer. One that accepts a call and
# never replies holds the driver for 35 seconds each time.
REST = 300.0
VIEW = "?workflowType=machine_learning"  # without it the pages of a run are those for prompts

SHARED, PARAMS = "mlflow.sharedViewState.", 6  # so many columns of params fit
LISTS = {"runs": "", "charts": "&compareRunsMode=CHART"}  # how a list of runs is shown
# MLflow draws tables without a gap between columns. The line below the header has none to fill.
_ROW, GAP = re.compile(r"^\| .*[^-:| \n].*\|$", re.MULTILINE), "&emsp;"

# For a first look: who has no server should know at once.
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# What a server says in the same words when its database is busy or a moment away.
WEATHER = ("QueuePool limit", "deadlock detected", "terminating connection", "closed unexpectedly")


@dataclass
class _Opened:
    """A sweep's parent, reached through a client, and what is known to be below it."""

    client: MlflowClient
    experiment: str
    parent: str
    folder: str
    status: str
    tags: dict[str, str]  # of the parent
    below: Below
    lists: dict[str, str]  # tags of the experiment

    @property
    def children(self) -> dict[str, Child]:
        """Trials by slot."""
        return self.below.trials

    @property
    def points(self) -> dict[str, Child]:
        """Settings by point."""
        return self.below.points


class MlflowTracker:
    """Sweeps as parents, outcomes and settings as children, in the experiment `air/<project>`.

    Args:
        uri: of a server, or of a sqlite file.
        project: the second half of the experiment's name.
        database: the sqlite file. Artifacts then lie in a folder beside it, under addresses that do
            not name that folder, so that the two can be moved. None: the server keeps them.
    """

    def __init__(self, uri: str, *, project: str, database: Path | None) -> None:
        self._uri = uri
        self._place = without_credentials(uri)
        self._project, self._name = project, f"air/{project}"
        self._database = database
        self._sweep: SweepRun | None = None
        self._live = True
        self._opened: _Opened | None = None  # None: not reached yet, or not since an outage
        self._untold: dict[tuple[str, str], TrialRun | PointRun] = {}
        self._rest_until = self._uploads_rest_until = 0.0
        self._complained = False
        self._counts = Told()
        self._page = ""

    def check(self) -> None:
        if self._database is not None:
            try:
                self._database.parent.mkdir(parents=True, exist_ok=True)
                if self._database.exists():
                    check_database(self._database)
            except OSError as problem:
                raise TrackerAway(f"MLflow's file cannot be used: {problem}") from problem
            return
        with quiet(), environment(QUICK):  # MLflow asks for them at each call
            try:
                self._try_to_write(MlflowClient(self._uri))
            except MlflowException as trouble:
                barred = why_barred(trouble, self._place, f"the experiment {self._name}")
                if barred is not None:
                    raise ValueError(barred) from trouble
                raise TrackerAway(
                    f"MLflow at {self._place} does not answer ({reason(trouble)})"
                ) from trouble

    def _try_to_write(self, client: MlflowClient) -> None:
        """Who may read an experiment may not always write to it. To make one is anybody's right."""
        found = client.get_experiment_by_name(self._name)
        if found is None or found.lifecycle_stage == "deleted":
            return
        try:
            client.set_experiment_tag(found.experiment_id, "air.project", self._project)
        except MlflowException as error:
            # Two drivers that write a tag for the first time: one is told that it is there.
            if error.error_code not in REFUSED:
                raise

    def start(self, run: SweepRun, *, live: bool = True) -> str:
        self._sweep, self._live, self._opened, self._untold = run, live, None, {}
        self._rest_until = self._uploads_rest_until = 0.0
        self._counts = Told()
        self._catch_up()
        return self._opened.parent if self._opened else ""

    def trial(self, run: TrialRun) -> None:
        if len(self._untold) < MAX_UNTOLD:
            self._untold["trial", run.slot] = run
        else:
            self._counts.missed += 1
        self._catch_up()

    def point(self, run: PointRun) -> None:
        self._untold["point", run.point] = run  # hardly more than its trials are held for it
        self._catch_up()

    def finish(self, status: Status, note: str | None, artifacts: Mapping[str, Path]) -> Told:
        if status != "KILLED":  # who is being killed has no time to wait for a server that is away
            self._rest_until = self._uploads_rest_until = 0.0
        if not (self._catch_up() and self._close(status, note, artifacts)):
            self._counts.missed += sum(kind == "trial" for kind, _ in self._untold)
            self._counts.sweep = "missed"
        return self._counts

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
        with quiet():
            try:
                self._opened = self._opened or self._open()
                for name, run in list(self._untold.items()):
                    told = self._tell_unless_refused(self._opened, run)
                    if isinstance(run, PointRun):
                        self._counts.points += told
                    elif told:
                        self._counts.told += 1
                    else:
                        self._counts.there += 1
                    del self._untold[name]
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
                "MLflow at %s fails (%s); what it misses is told later",
                *(self._place, reason(trouble)),
            )
        self._complained = True

    def _tell_unless_refused(self, opened: _Opened, run: TrialRun | PointRun) -> bool:
        try:
            if isinstance(run, PointRun):
                return self._tell_point(opened, run)
            return self._tell(opened, run)
        except MlflowException as error:
            if error.error_code not in REFUSED or any(words in str(error) for words in WEATHER):
                raise
            # Bad data, not bad weather: trying again is no use, and others may pass.
            log.warning("MLflow refuses %s: %s", run.name, reason(error))
            return False

    def _tell(self, opened: _Opened, run: TrialRun) -> bool:
        """Whether there was anything to tell."""
        client = opened.client
        child = opened.children.get(run.slot)
        if child is not None and not child.is_about(run):
            # An edited spec or a cleared store has put another computation into this slot. Params
            # cannot be changed and a history cannot hold two runs, so the child is a new one.
            client.delete_run(child.run_id)  # hidden, and can be restored
            del opened.children[run.slot]
            child = None
        if child is None:
            # A killed driver leaves this much behind; the slot is how the next one finds it.
            identity = {"air.slot": run.slot, "air.trial_key": run.tags.get("air.trial_key", "")}
            child = self._create(opened, "trial", identity, run)
            opened.children[run.slot] = child
        if child.says(run, self._child_tags(run, run.artifacts)):
            return False  # by the names of the files: to look at them may be to make them
        artifacts = small_artifacts(run.artifacts, run.name)
        told = self._child_tags(run, artifacts)
        if child.says(run, told):
            return False
        if child.tags.get("air.artifacts") != told.get("air.artifacts"):
            uploaded = self._upload(opened, child.folder, artifacts)
            told = self._child_tags(run, uploaded)
        changed = {key: value for key, value in told.items() if child.tags.get(key) != value}
        params = {key: value for key, value in run.params.items() if key not in child.params}
        points = run.points()
        log_batch(client, child.run_id, tags=changed, params=params, points=points)
        if run.failure_class is None and "air.failure_class" in child.tags:
            client.delete_tag(child.run_id, "air.failure_class")
            del child.tags["air.failure_class"]
        client.set_terminated(child.run_id, run.status, run.ended)
        child.tags.update(told)
        child.params.update(params)
        child.metrics.update(points)
        child.status, child.ended = run.status, run.ended
        return True

    def _tell_point(self, opened: _Opened, run: PointRun) -> bool:
        """Whether there was anything to tell. Three requests, or one where only words changed."""
        client = opened.client
        child = opened.points.get(run.point)
        if child is not None and child.tags.get("air.content") != run.content:
            # Other runs, other numbers: a seed was added, say. A history would hold both.
            client.delete_run(child.run_id)
            del opened.points[run.point]
            child = None
        if child is None:
            identity = {"air.point": run.point, "air.content": run.content}
            child = self._create(opened, "point", identity, run)
            opened.points[run.point] = child
        tags = self._point_tags(opened, run)
        changed = {key: value for key, value in tags.items() if child.tags.get(key) != value}
        params = {key: value for key, value in run.params.items() if key not in child.params}
        if child.computed(run):
            if not (changed or params):
                return False
            log_batch(client, child.run_id, tags=changed, params=params)
        else:
            numbers = run.numbers()
            changed |= filled({"air.interval": numbers.interval})
            points = series(numbers.metrics, numbers.curves, run.started, run.ended)
            log_batch(client, child.run_id, tags=changed, params=params, points=points)
            client.set_terminated(child.run_id, "FINISHED", run.ended)
            child.metrics.update(points)
            child.status, child.ended = "FINISHED", run.ended
        child.tags.update(changed)
        child.params.update(params)
        return True

    def _create(
        self, opened: _Opened, kind: str, identity: dict[str, str], run: TrialRun | PointRun
    ) -> Child:
        tags = {"air.kind": kind, **identity, MLFLOW_PARENT_RUN_ID: opened.parent}
        created = opened.client.create_run(opened.experiment, run.started, filled(tags), run.name)
        return child_of(created)

    def _point_tags(self, opened: _Opened, run: PointRun) -> dict[str, str]:
        assert self._sweep is not None
        ours = {
            "air.sweep": self._sweep.sweep,
            MLFLOW_RUN_NAME: run.name,
            MLFLOW_RUN_NOTE: self._resolved(opened, run.note),
        }
        return filled(run.tags | ours | system_tags(self._sweep))

    def _resolved(self, opened: _Opened, note: str, files: Container[str] = ()) -> str:
        """A note with addresses that a server's pages resolve, wherever it is reached.

        Args:
            files: of the sweep, that have arrived.
        """
        runs = f"#/experiments/{opened.experiment}/runs"

        def find(target: str, name: str) -> str | None:
            if target == "file":
                where = f"get-artifact?path={quote(name)}&run_uuid={opened.parent}"
                return where if name in files else None
            if target in LISTS:
                return f"{runs}{VIEW}&viewStateShareKey={self._list_key(name)}{LISTS[target]}"
            child = opened.below.find(target, name)
            return f"{runs}/{child.run_id}{VIEW}" if child is not None else None

        return _ROW.sub(lambda row: row[0].replace(" |", f"{GAP}|"), linked(note, find))

    def _child_tags(self, run: TrialRun, artifacts: Mapping[str, Path]) -> dict[str, str]:
        assert self._sweep is not None
        ours = {
            "air.state": run.state,
            "air.failure_class": run.failure_class or "",
            "air.sweep": self._sweep.sweep,
            "air.artifacts": ", ".join(sorted(artifacts)),  # those that have arrived
            MLFLOW_RUN_NAME: run.name,
        }
        # What the record says of its making counts more than who tells of it now.
        made = {
            MLFLOW_USER: run.tags.get("air.user", ""),
            MLFLOW_GIT_COMMIT: run.tags.get("air.commit", ""),
        }
        return filled(run.tags | ours | system_tags(self._sweep) | filled(made))

    def _list_key(self, kind: str) -> str:
        assert self._sweep is not None
        return f"air-{self._sweep.sweep}-{kind}"

    def _keep_lists(self, opened: _Opened) -> None:
        """Tags of the experiment by which a link opens a list of runs with its columns.

        MLflow keeps its columns in each browser, at first without any metric. What it shares by
        "copy link" is such a tag.
        """
        assert self._sweep is not None
        for kind, children in (("point", opened.points), ("trial", opened.children)):
            metrics = {name for child in children.values() for name in child.metrics}
            params = sorted({name for child in children.values() for name in child.params})
            headline = "test/harmonic_mean" if "test/harmonic_mean" in metrics else "test/accuracy"
            shown = [headline, f"{headline}_low", f"{headline}_high", "n"]
            shown = [name for name in shown if name in metrics]
            view = {
                "searchFilter": f"tags.`air.sweep` = '{self._sweep.sweep}' "
                f"and tags.`air.kind` = '{kind}'",
                "orderByKey": f"metrics.`{headline}`",
                "orderByAsc": False,
                "selectedColumns": [
                    *(f"params.`{name}`" for name in params[:PARAMS]),
                    *(f"metrics.`{name}`" for name in shown),
                ],
            }
            name, value = f"{SHARED}{self._list_key(kind)}", json.dumps(view)
            if children and opened.lists.get(name) != value:
                opened.client.set_experiment_tag(opened.experiment, name, value)
                opened.lists[name] = value

    # Opening and closing the parent.

    def _open(self) -> _Opened:
        assert self._sweep is not None, "start() comes first"
        sweep = self._sweep
        client = self._connect()
        experiment, lists = self._experiment(client)
        identity = {"air.kind": "sweep", "air.sweep": sweep.sweep}
        about = {"air.project": sweep.project, "air.spec_hash": sweep.spec_hash}
        about["air.user"] = sweep.user
        if self._live:
            about[MLFLOW_RUN_NOTE] = sweep.note
        sweeps = list(search(client, experiment, "tags.`air.kind` = 'sweep'"))
        parents = [run for run in sweeps if run.data.tags.get("air.sweep") == sweep.sweep]
        for spare in parents[1:]:
            if spare.info.status == "RUNNING":  # a request whose reply was lost was sent again
                client.delete_run(spare.info.run_id)
        parent = next(iter(parents), None)
        if parent is None:
            parent = client.create_run(experiment, None, identity, sweep.sweep)
            self._counts.sweep = "told"
        parent_id, status = parent.info.run_id, parent.info.status
        if status != "RUNNING" and self._live:
            client.update_run(parent_id, status := "RUNNING")
        new = {key: value for key, value in sweep.params.items() if key not in parent.data.params}
        opened = _Opened(
            *(client, experiment, parent_id, parent.info.artifact_uri, status),
            *(dict(parent.data.tags), children_below(client, experiment, parent_id), lists),
        )
        self._say_of_parent(opened, about | system_tags(sweep), new)
        self._page = f"#/experiments/{experiment}/runs/{parent_id}{VIEW}"
        return opened

    def _say_of_parent(
        self, opened: _Opened, tags: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> None:
        """Write what the parent does not say yet."""
        tags = {k: v for k, v in filled(tags).items() if opened.tags.get(k) != v}
        if tags or params:
            log_batch(opened.client, opened.parent, tags=tags, params=params)
            opened.tags |= tags
            self._counts.sweep = "told"

    def _close(self, status: Status, note: str | None, artifacts: Mapping[str, Path]) -> bool:
        assert self._opened is not None
        opened, client = self._opened, self._opened.client
        with quiet():
            try:
                below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{opened.parent}'"
                running = f"{below} and attributes.status = 'RUNNING'"  # of killed drivers
                for run in list(search(client, opened.experiment, running)):
                    if opened.below.twin(run) is not None:
                        client.delete_run(run.info.run_id)  # made twice by a retried request
                    else:
                        client.set_terminated(run.info.run_id, "KILLED")
                    self._counts.sweep = "told"
                states = Counter(c.tags.get("air.state") for c in opened.children.values())
                named = ["done", "reused", "failed", *(["pruned"] if states["pruned"] else [])]
                counts = {f"air.{state}": str(states[state]) for state in named}
                if note is not None:
                    files = small_artifacts(artifacts, "the sweep")
                    shown = {"air.artifacts": contents(files)}
                    if opened.tags.get("air.artifacts", "") != shown["air.artifacts"]:
                        files = self._upload(opened, opened.folder, files)
                        shown = {"air.artifacts": contents(files)}
                    counts |= {MLFLOW_RUN_NOTE: self._resolved(opened, note, files), **shown}
                    self._keep_lists(opened)
                self._say_of_parent(opened, counts)
                if opened.status != status:
                    client.set_terminated(opened.parent, status)
                    opened.status, self._counts.sweep = status, "told"
            except Trouble as trouble:
                self._no_answer(trouble)
                return False
        return True

    def _connect(self) -> MlflowClient:
        if self._database is None:
            return MlflowClient(self._uri)
        self._database.parent.mkdir(parents=True, exist_ok=True)
        # Of two processes that create one file at the same time, one fails half-way.
        mode = lock_mode(self._database.parent)
        with FileLock(f"{self._database}.lock", timeout=120, mode=mode):
            if not self._database.exists():
                create_database(self._database)
            check_database(self._database)
            return MlflowClient(self._uri)

    def _experiment(self, client: MlflowClient) -> tuple[str, dict[str, str]]:
        """Its id, and its tags."""
        name = self._name
        found: Experiment | None = client.get_experiment_by_name(name)
        if found is None:
            location = None if self._database is None else f"mlflow-artifacts:/{slug(name)}"
            kind = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return str(client.create_experiment(name, location, kind)), kind
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self._experiment(client)  # another sweep has just made it
        if found.lifecycle_stage == "deleted":
            log.warning("the experiment %s was deleted in MLflow; it is restored", name)
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id), dict(found.tags)

    # Artifacts.

    def _upload(
        self, opened: _Opened, folder: str, artifacts: Mapping[str, Path]
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
                put_artifact(opened.client, self._database, folder, name, path)
                arrived[name] = path
        except Trouble as trouble:
            self._uploads_rest_until = time.monotonic() + REST
            log.warning("MLflow takes no artifacts for now (%s)", reason(trouble))
        return arrived


def system_tags(sweep: SweepRun) -> dict[str, str]:
    """What MLflow would find out by itself, had the driver a checkout and the worker a user."""
    return {
        MLFLOW_USER: sweep.user,
        MLFLOW_SOURCE_NAME: sweep.source,
        MLFLOW_SOURCE_TYPE: "JOB",
        MLFLOW_GIT_COMMIT: sweep.commit,
    }
