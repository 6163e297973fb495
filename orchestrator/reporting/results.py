"""Results and status of a sweep, read from its event log and the store.

This module does not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from air_core.bundle.checks import CLASSIFIERS
from air_core.paradigms import seen_unseen
from orchestrator.planning import Plan, Slot, plan_of
from orchestrator.planning.plan import RESULT_STATES, LoggedResults
from orchestrator.planning.recorded import read_sweep
from orchestrator.reporting.comparisons import Results
from orchestrator.reporting.rows import FinishedTrial, dataset_text
from orchestrator.spec.space import first_point_text
from orchestrator.stages.dataset_text import names_text, tested_classes
from orchestrator.store import (
    ArtifactStore,
    EventLog,
    SweepLocation,
    TrialRecord,
    read_outcome,
    read_trial,
    recorded_locations,
)

if TYPE_CHECKING:
    from pandas import DataFrame

# Keys that have a column in every table, whether or not the sweep varies them.
TASK_KEYS = ("dataset", "test_dataset", "paradigm", "modality")
TABLE_COLUMNS = (*TASK_KEYS, "method")


def finished_records(plan: Plan, store: ArtifactStore) -> list[tuple[Slot, TrialRecord]]:
    """The slots with a record in the store, and the records."""
    slots = [slot for slot in plan.slots if store.has(slot.spec)]
    store.fetch(slot.spec for slot in slots)
    return [(slot, read_trial(slot.spec, store)) for slot in slots]


def finished_trial(
    slot: Slot, record: TrialRecord, objective: float | None = None
) -> FinishedTrial:
    """Combine a slot of the plan with its record.

    Args:
        objective: of the slot's point, mean over its runs.
    """
    arrays = record.test_arrays()
    return FinishedTrial(
        cell=slot.cell.id,
        method=slot.cell.method,
        flat=all_settings(slot),
        settings=varied_settings(slot),
        point=slot.point,
        seed=slot.spec.seed,
        split_seed=_split(slot),
        objective=objective,
        metrics=record.metrics,
        image_ids=arrays["index"],
        predictions=arrays["predictions"],
        by_classifier={name: arrays[name] for name in CLASSIFIERS if name in arrays},
        labels=arrays["labels"],
        unseen=_unseen(slot, arrays["labels"]),
        searched=frozenset(slot.params),
        first_point=first_point_text(slot.cell),
        key=record.key,
        curves=record.curves,
    )


def _split(slot: Slot) -> int | str:
    """The split of a run; with its seen classes, where the runs of a point differ in them."""
    spec = slot.spec
    if spec.paradigm != "trzsl" or "class_seed" in slot.cell.flat:
        return spec.split_seed
    return f"{spec.split_seed}, class seed {spec.class_seed}"


def results_of(
    plan: Plan,
    store: ArtifactStore,
    records: Sequence[tuple[Slot, TrialRecord]] | None = None,
) -> Results:
    """The rows of a sweep's table and the trials behind them, in the order of the plan.

    Args:
        records: the result of `finished_records`, if the caller has it already.
    """
    search_objective = plan.sweep.search.objective if plan.sweep.search else None
    records = finished_records(plan, store) if records is None else records
    objectives = _objectives(records, search_objective, len(plan.sweep.seeds.values))
    trials = [
        finished_trial(slot, record, objectives.get((slot.cell.id, slot.point)))
        for slot, record in records
    ]
    tested = {dataset_text(slot.cell.flat): slot.spec for slot, _ in records}
    return Results(
        trials,
        search_objective,
        {name: len(tested_classes(spec, store)) for name, spec in tested.items()},
        plan.sweep.is_smoke,
    )


def _unseen(slot: Slot, labels: np.ndarray) -> np.ndarray | None:
    if slot.spec.paradigm != "trzsl":
        return None
    _, unseen = seen_unseen(len(slot.spec.classnames), slot.spec.class_seed)
    return np.isin(labels, unseen)


def all_settings(slot: Slot) -> dict[str, Any]:
    """All settings of a slot, by their dotted names."""
    return {**slot.cell.flat, **slot.params, **slot.seeds}


def varied_settings(slot: Slot) -> dict[str, Any]:
    """The settings of a slot that the sweep varies, except `TABLE_COLUMNS` and the seeds.

    They have the order of the sweep file; parameters read from an event log do not keep it.
    """
    grid = {name: value for name, value in slot.cell.chosen.items() if name not in TABLE_COLUMNS}
    searched = {dim.key: None for dim in slot.cell.space if dim.key in slot.params}
    return {**grid, **searched, **slot.params}


def _objectives(
    records: Sequence[tuple[Slot, TrialRecord]], objective: str | None, runs: int
) -> dict[tuple[str, int], float]:
    """Mean objective over the runs of each point that has all its runs, by cell and point."""
    if objective is None:
        return {}
    values: dict[tuple[str, int], list[float]] = {}
    for slot, record in records:
        values.setdefault((slot.cell.id, slot.point), []).append(record.objectives[objective])
    return {point: fmean(of_runs) for point, of_runs in values.items() if len(of_runs) == runs}


# ---------------------------------------------------------------- frames

CURVES = ("trial", "metric", "iteration", "value")


def trials_frame(plan: Plan, store: ArtifactStore, event_log: EventLog) -> DataFrame:
    """One line per trial of the plan. Points that a search has not proposed yet have no trials.

    Columns: `trial` (the slot) and `key` (12 digits), which `predictions` accepts; `cell`,
    `point`; `TABLE_COLUMNS`; every setting that the sweep varies; the seeds; `state` (done, reused,
    shared, recovered, failed, running, waiting); `failure` and `message` of failed trials;
    `seconds` and every metric, NaN where a trial has no value.
    """
    from pandas import DataFrame

    status = sweep_status(event_log)
    alive = "running" in status.last.values() and event_log.is_locked()
    match_plan(status, plan, store, alive)
    records = {slot.id: record for slot, record in finished_records(plan, store)}
    settings = dict.fromkeys(key for slot in plan.slots for key in _settings(slot))
    lines = []
    for slot in plan.slots:
        record = records.get(slot.id)
        state = status.last.get(slot.id, "waiting")
        if state not in ENDED:
            state = "running" if alive and state == "running" else "waiting"
        failure = status.failures.get(slot.id, {}) if state == "failed" else {}
        line = {
            "trial": slot.id,
            "key": slot.key.digest[:12],
            "cell": slot.cell.id,
            "point": slot.point,
            **settings,
            **_settings(slot),
            "seed": slot.spec.seed,
            **slot.seeds,
            "state": state,
            "failure": failure.get("failure_class", ""),
            "message": failure.get("message", ""),
        }
        if record is not None:
            line |= {"seconds": record.seconds, **record.metrics}
        lines.append(line)
    return DataFrame(lines)


def curves_frame(plan: Plan, store: ArtifactStore) -> DataFrame:
    """One line per value of each curve: `trial`, `metric`, `iteration` from 0, `value`.

    Trials without training have no curves.
    """
    from pandas import DataFrame

    lines = [
        (slot.id, metric, iteration, value)
        for slot, record in finished_records(plan, store)
        for metric, values in record.curves.items()
        for iteration, value in enumerate(values)
    ]
    return DataFrame(lines, columns=list(CURVES))


def _settings(slot: Slot) -> dict[str, Any]:
    columns = {name: slot.cell.flat.get(name) for name in TABLE_COLUMNS if name != "method"}
    columns = {name: value for name, value in columns.items() if value is not None}
    return {**columns, "method": slot.cell.method, **varied_settings(slot)}


# ---------------------------------------------------------------- sweeps of a store


def overviews(store: ArtifactStore) -> list[dict[str, Any]]:
    """State and best classifiers of each sweep of a store, for `airsweep list --json`.

    `best` has the row of each task's best classifier, with mean, deviation and interval of this
    `classifier`. It is empty if no trial is finished, or if a file of the sweep is damaged, which
    `airsweep table` reports; the state is `damaged` if it is the event log.
    """
    return [_overview(location) for location in recorded_locations(store)]


def _overview(location: SweepLocation) -> dict[str, Any]:
    event_log = location.event_log()
    alive, status, state, last = event_log.is_locked(), SweepStatus(), "damaged", None
    best: list[dict[str, Any]] = []
    options = ""
    with suppress(ValueError, OSError):
        last = max((event["time"] for event in event_log.events()), default=None)
        status = sweep_status(event_log)
        state = read_outcome(location).get("state", "unknown")
        if status.exit_code is None:
            state = "killed"
        sweep, recorded = read_sweep(location, location.data_root)
        options = sweep.options
        plan = plan_of(sweep, recorded)
        match_plan(status, plan, location.store, alive)
        state = "removed" if status.removed else state
        results = results_of(plan, location.store)
        best = [
            found.as_json() | {"at_chance": results.is_at_chance(found.row, found.test)}
            for found in results.best_classifiers.values()
        ]
    counts = status.counts(alive)
    return {
        "sweep": location.full_name,
        "options": options,
        "state": "running" if alive else state,
        "finished": sum(counts[state] for state in RESULT_STATES),
        "failed": counts["failed"],
        "total": sum(counts.values()),
        "last_event": last,
        "best": best,
    }


# ---------------------------------------------------------------- status


ENDED = (*RESULT_STATES, "failed")


@dataclass
class SweepStatus:
    """The status of a sweep according to its event log."""

    total: int = 0  # trials
    last: dict[str, str] = field(default_factory=dict)  # state of each slot
    keys: dict[str, str] = field(default_factory=dict)  # of the trials that ended, by slot
    results: LoggedResults = field(default_factory=LoggedResults)
    removed: int = 0  # results that the event log has and the store does not
    last_run: Counter[str] = field(default_factory=Counter)  # ends of trials in it, by state
    failures: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # last event, by slot
    prepared: Counter[str] = field(default_factory=Counter)  # artifacts, by stage
    images: Counter[str] = field(default_factory=Counter)  # drawn, redrawn, holes
    hole_files: list[str] = field(default_factory=list)  # ready images that are holes
    failed_artifacts: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # events, by key
    pending_artifacts: dict[str, int] = field(default_factory=dict)  # units left to make, by key
    waiting_cells: tuple[str, ...] = ()  # cells that need a pending artifact
    retried: Counter[str] = field(default_factory=Counter)  # by failure class, in the last run
    exit_code: int | None = None  # of the last run; None: it runs, or was killed

    def counts(self, alive: bool) -> dict[str, int]:
        """Number of trials by state.

        Args:
            alive: whether a driver is running; if not, running trials count as waiting.
        """
        counts = Counter(self.last.values())
        running = counts["running"] if alive else 0
        ended = {name: counts[name] for name in ENDED}
        return {
            **ended,
            "running": running,
            "waiting": max(0, self.total - sum(ended.values()) - running),
        }


def plan_status(plan: Plan, location: SweepLocation, alive: bool = False) -> SweepStatus:
    """The status of a plan's trials, see `match_plan`."""
    status = sweep_status(location.event_log())
    match_plan(status, plan, location.store, alive)
    return status


def match_plan(status: SweepStatus, plan: Plan, store: ArtifactStore, alive: bool = False) -> None:
    """Make the status that of a plan's trials.

    The event log also has trials of earlier versions of the sweep file, some in the slots of other
    trials; they are left out. Unless a driver is `alive`, results are added that the store has and
    the event log does not: those of a killed run, and those of other sweeps. The next run logs them
    in the same states.
    """
    planned = {slot.id: slot.key.digest for slot in plan.slots}
    status.results.assign(planned)
    for name, state in [*status.last.items()]:
        other_trial = state in ENDED and status.keys[name] != planned.get(name)
        if name not in planned or other_trial:
            del status.last[name]
            status.failures.pop(name, None)
        elif state in RESULT_STATES:
            status.last[name] = status.results.state(name, planned[name])
    status.total = plan.total
    for slot in () if alive else plan.slots:
        ended, has_result = status.last.get(slot.id), store.has(slot.spec)
        if ended in RESULT_STATES and not has_result:
            status.removed += 1
            del status.last[slot.id]
        elif has_result and ended not in ENDED:
            status.last[slot.id] = status.results.state(slot.id, slot.key.digest)
            status.failures.pop(slot.id, None)


IMAGE_COUNTS = ("drawn", "redrawn", "holes")


def holes_text(images: Mapping[str, int], files: Sequence[str]) -> str:
    """Synthetic images that no trial reads; empty if there are none.

    >>> holes_text({"drawn": 14, "holes": 2}, ["cat/1.png"])
    '2 of 16 synthetic images given up, blank or unreadable (cat/1.png)'
    """
    holes = images["holes"]
    named = f" ({names_text(files)})" if files else ""
    total = images["drawn"] + holes
    text = f"{holes:,} of {total:,} synthetic images given up, blank or unreadable{named}"
    return text if holes else ""


def sweep_status(event_log: EventLog) -> SweepStatus:
    """Read the status of a sweep from its event log."""
    status = SweepStatus()
    for event in event_log.events():
        result = status.results.read(event)
        match event["event"]:
            case "sweep_started":
                status.total, status.exit_code = event["total"], None
                status.last_run = Counter()
                status.retried, status.failed_artifacts = Counter(), {}
                status.pending_artifacts, status.waiting_cells = {}, ()
            case "cells_waiting":
                status.pending_artifacts = dict(event["artifacts"])
                status.waiting_cells = tuple(event["cells"])
            case "cells_ready":
                status.pending_artifacts, status.waiting_cells = {}, ()
            case "artifact_failed":
                status.failed_artifacts[event["key"]] = event
            case "artifact_retried" | "trial_retried":
                status.retried[event["failure_class"]] += 1
            case "trials_started":
                status.last |= dict.fromkeys(event["slots"], "running")
            case "trial_done" | "trial_reused" | "trial_failed" as name:
                status.last[event["slot"]] = result or name.removeprefix("trial_")
                status.last_run[status.last[event["slot"]]] += 1
                status.keys[event["slot"]] = event["key"]
                status.failures.pop(event["slot"], None)
                if name == "trial_failed":
                    status.failures[event["slot"]] = event
            case "artifact_prepared":
                status.prepared[event["stage"]] += 1
                if event["stage"] == "images":
                    counts = event.get("facts", {})
                    status.images.update({name: counts.get(name, 0) for name in IMAGE_COUNTS})
                    status.hole_files += event.get("hole_files", [])
                if event["key"] in status.pending_artifacts:
                    status.pending_artifacts[event["key"]] -= 1
            case "sweep_ended":
                status.exit_code = event["exit_code"]
    return status
