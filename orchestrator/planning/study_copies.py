"""Copies of a sweep's studies for `optuna-dashboard`. Uses no sampler and no Ray.

Studies are copied to a file of the sweep or to the Postgres database of a team. Searches never read
a copy, so a copy may show what a search must not see: the test metric of each point.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from orchestrator.errors import StudiesUnreachable
from orchestrator.planning.plan import Plan, Slot, fp32_slots, slots_of
from orchestrator.planning.resolve import Resolver
from orchestrator.spec import Cell
from orchestrator.spec.space import Point
from orchestrator.spec.sweep import Search
from orchestrator.store import ArtifactStore, EventLog, TrialRecord, read_trial

ATTEMPTS = 8  # to connect while the tables are being created

log = logging.getLogger(__name__)


def open_storage(path: Path) -> JournalStorage:
    """Open the file that a sweep's studies are copied to."""
    return JournalStorage(JournalFileBackend(str(path)))


# Errors that need a change by the user; other errors may be temporary.
USER_ERRORS = (
    "authentication failed",
    "no password supplied",
    "does not exist",
    "permission denied",
)


def open_database(uri: str) -> RDBStorage:
    """Open the database that the studies of a team are copied to.

    A driver holds one connection while it copies a round, and none while trials run.

    Args:
        uri: `postgresql://...` without a password; libpq reads the password from PGPASSWORD,
            PGPASSFILE or ~/.pgpass.

    Raises:
        ValueError: the database rejects the login or does not exist.
        StudiesUnreachable: the database is unreachable.
    """
    from sqlalchemy.exc import DBAPIError

    # Name the driver, since the default depends on the version of SQLAlchemy.
    address = uri.replace("postgresql://", "postgresql+psycopg://", 1)
    options = {"pool_size": 1, "max_overflow": 1, "connect_args": {"connect_timeout": 10}}
    for attempt in range(ATTEMPTS):
        try:
            storage = RDBStorage(address, engine_kwargs=options)
            storage.engine.dispose()
            return storage
        except ImportError as missing:
            raise ValueError(
                "search.storage needs psycopg, which is not installed; run "
                "`pip install 'airsweep[postgres]'`"
            ) from missing
        except (StorageInternalError, DBAPIError) as error:
            reason = _root_cause(error)
            # Two drivers created the tables at the same time: the slower driver tries again.
            if "already exists" in f"{error}" or "duplicate key" in f"{error}":
                time.sleep(0.2 * (attempt + 1))
                continue
            if any(words in f"{error}" for words in USER_ERRORS):
                raise ValueError(
                    f"the studies' database {database_address(uri)} rejects the login ({reason}); "
                    "set PGPASSWORD or write ~/.pgpass, and check that the database exists"
                ) from error
            raise StudiesUnreachable(_unreachable(uri, reason)) from error
    raise StudiesUnreachable(_unreachable(uri, "other drivers are creating its tables"))


def database_address(uri: str) -> str:
    """Server and database of a URI, for messages.

    >>> database_address("postgresql://ada@db.example:5432/studies?sslmode=require")
    'db.example:5432/studies'
    """
    parts = urlsplit(uri)
    return f"{parts.netloc.rpartition('@')[2]}{parts.path}"


def _unreachable(uri: str, reason: str) -> str:
    return f"the studies' database {database_address(uri)} is unreachable ({reason})"


def _root_cause(error: BaseException) -> str:
    """First line of the message of libpq, which SQLAlchemy and Optuna wrap."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in f"{cause}".strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(cause).__name__)[:200]


# ---------------------------------------------------------------- details of points


@dataclass(frozen=True)
class PointDetails:
    """What a copy has about a point beside its settings and its objective."""

    attributes: Mapping[str, Any]
    span: tuple[float, float] | None  # start and end of its trials, seconds since the epoch


DescribePoints = Callable[[Cell, Sequence[Point]], list[PointDetails]]


def describe_points(
    plan: Plan,
    store: ArtifactStore,
    resolver: Resolver,
    event_log: EventLog,
    run_id: Callable[[str], str | None],
) -> DescribePoints:
    """Return a function that reads the details of a cell's points.

    Times come from the records, like those in MLflow, so a reused trial has its original times. A
    failed or pruned trial has no record; its times come from the event log.

    Args:
        run_id: returns the MLflow run of a setting, CELL/POINT; None if MLflow has none.
    """
    moved, assignments = fp32_slots(event_log), plan.sweep.seeds.assignments()

    def describe(cell: Cell, points: Sequence[Point]) -> list[PointDetails]:
        slots = [
            slots_of(cell, point.number, point.params, assignments, resolver, moved)
            for point in points
        ]
        done = [slot for of_point in slots for slot in of_point if store.has(slot.spec)]
        store.fetch(slot.spec for slot in done)
        records = {slot.id: read_trial(slot.spec, store) for slot in done}
        spans = {
            slot: (each.started, each.started + each.seconds) for slot, each in records.items()
        }
        if len(done) < sum(map(len, slots)):
            spans = _logged_spans(event_log) | spans
        return [
            _details(of_point, records, spans, run_id(f"{cell.id}/{point.number}"))
            for point, of_point in zip(points, slots, strict=True)
        ]

    return describe


def _details(
    slots: Sequence[Slot],
    records: Mapping[str, TrialRecord],
    spans: Mapping[str, tuple[float, float]],
    run_id: str | None,
) -> PointDetails:
    done = [records[slot.id] for slot in slots if slot.id in records]
    known = [spans[slot.id] for slot in slots if slot.id in spans]
    attributes: dict[str, Any] = {f"trial_key {_seeds(slot)}": slot.key.digest for slot in slots}
    if run_id is not None:
        attributes["mlflow_run_id"] = run_id
    if scores := [each.headline for each in done if each.headline is not None]:
        metric = "harmonic_mean" if "test/harmonic_mean" in done[0].metrics else "accuracy"
        attributes[f"test/{metric} (not an objective)"] = fmean(scores)
    span = (min(start for start, _ in known), max(end for _, end in known)) if known else None
    return PointDetails(attributes, span)


def _seeds(slot: Slot) -> str:
    return ", ".join(f"{name}={value}" for name, value in slot.seeds.items())


def _logged_spans(event_log: EventLog) -> dict[str, tuple[float, float]]:
    """Last start and end of each slot that has ended, by the event log."""
    started: dict[str, float] = {}
    spans: dict[str, tuple[float, float]] = {}
    for event in event_log.events():
        match event["event"]:
            case "trials_started":
                started |= dict.fromkeys(event["slots"], event["time"])
            case "trial_done" | "trial_reused" | "trial_failed" | "trial_pruned":
                slot, ended = event["slot"], event["time"]
                spans[slot] = (started.get(slot, ended), ended)
    return spans


# ---------------------------------------------------------------- a copy


class StudyCopy:
    """The copy of one study.

    Args:
        name: of the study in the storage.
        sweep: PROJECT/NAME.
        describe: from `describe_points`.
    """

    def __init__(
        self,
        cell: Cell,
        search: Search,
        storage: BaseStorage,
        name: str,
        sweep: str,
        describe: DescribePoints,
    ) -> None:
        self._cell, self._search, self._storage, self._name = cell, search, storage, name
        self._sweep, self._describe = sweep, describe
        self._study: optuna.Study | None = None

    def update(self, study: optuna.Study) -> None:
        """Copy the points that have ended since the last update.

        If the database is unreachable, a later update includes these points.
        """
        if not isinstance(self._storage, RDBStorage):
            self._update(study)
            return
        from sqlalchemy.exc import DBAPIError

        try:
            self._update(study)
            self._storage.engine.dispose()  # no connection is needed while trials run
        except (StorageInternalError, DBAPIError) as error:
            self._study = None  # the copy may be incomplete: the next update starts anew
            log.warning(
                "%s; the search continues, and the next copy has these points too",
                _unreachable(self._search.storage, _root_cause(error)),
            )

    def renew(self, study: optuna.Study) -> None:
        """Copy all points again, since Optuna changes no attribute of a point that has ended."""
        self._study = None
        self.update(study)

    def _update(self, study: optuna.Study) -> None:
        self._study = self._study or self._create()
        copied = {trial.user_attrs["point"] for trial in self._study.get_trials(deepcopy=False)}
        new = [
            trial
            for trial in study.get_trials(deepcopy=False)
            if trial.user_attrs.get("point", -1) not in {-1, *copied}
        ]
        points = [Point(trial.user_attrs["point"], trial.params) for trial in new]
        details = self._describe(self._cell, points)
        for trial, of_point in zip(new, details, strict=True):
            self._study.add_trial(_with_details(trial, of_point))

    def _create(self) -> optuna.Study:
        with suppress(KeyError):
            optuna.delete_study(study_name=self._name, storage=self._storage)
        study = optuna.create_study(
            study_name=self._name, storage=self._storage, direction="maximize"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([self._search.objective])
        attributes = {
            "sweep": self._sweep, "cell": self._cell.id, "objective": self._search.objective
        }  # fmt: skip
        for name, value in attributes.items():
            study.set_user_attr(name, value)
        return study


def _with_details(trial: FrozenTrial, details: PointDetails) -> FrozenTrial:
    trial = copy.copy(trial)
    trial.user_attrs = {**trial.user_attrs, **details.attributes}
    if details.span is not None:
        trial.datetime_start, trial.datetime_complete = map(datetime.fromtimestamp, details.span)
    return trial
