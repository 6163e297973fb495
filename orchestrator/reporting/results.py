"""A sweep's outcomes, gathered from ledger and store for tables and frames. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from air_core.normal import normalised
from air_core.paradigms import seen_unseen
from orchestrator.planning import Plan, Slot
from orchestrator.reporting.rows import Entry, Results, rows
from orchestrator.store import ArtifactStore, EventLog, TrialRecord, read_trial

if TYPE_CHECKING:
    from pandas import DataFrame

NAMED = ("dataset", "test_dataset", "paradigm", "modality", "method")  # a table's own columns


def finished(plan: Plan, store: ArtifactStore) -> list[tuple[Slot, TrialRecord]]:
    """Each slot that has a record and whose point went to its end."""
    whole = [slot for slot in plan.slots if slot.id not in plan.pruned and store.has(slot.spec)]
    store.fetch(slot.spec for slot in whole)
    return [(slot, read_trial(slot.spec, store)) for slot in whole]


def entries_of(
    plan: Plan,
    store: ArtifactStore,
    done: Sequence[tuple[Slot, TrialRecord]] | None = None,
) -> list[Entry]:
    """One entry for each slot that is finished.

    Args:
        done: what `finished` says, where it is known already.
    """
    search = plan.sweep.search
    done = finished(plan, store) if done is None else done
    runs = len(plan.sweep.seeds.values)
    objectives = _objectives(done, search.objective if search else None, runs)
    return [
        entry_of(slot, record, objectives.get((slot.cell.id, slot.point))) for slot, record in done
    ]


def entry_of(slot: Slot, record: TrialRecord, objective: float | None = None) -> Entry:
    """A trial for tables.

    Args:
        objective: of its point.
    """
    image_ids, predictions, labels = record.predictions()
    return Entry(
        cell=slot.cell.id,
        method=slot.cell.method,
        flat=flat_of(slot),
        settings=settings_of(slot),
        point=slot.point,
        seed=normalised(slot.spec).seed,
        split_seed=slot.spec.split_seed,
        objective=objective,
        metrics=record.metrics,
        image_ids=image_ids,
        predictions=predictions,
        labels=labels,
        unseen=_unseen(slot, labels),
        digests=_digests(slot),
        key=record.key,
        curves=record.curves,
        seconds=record.seconds,
        made=record.made,
    )


def results_of(
    plan: Plan, store: ArtifactStore, done: Sequence[tuple[Slot, TrialRecord]] | None = None
) -> Results:
    """A sweep's rows: its search says by which objective points are chosen. As `entries_of`."""
    search, entries = plan.sweep.search, entries_of(plan, store, done)
    found = rows(entries, search.objective if search else None, pruned_points(plan))
    return Results(found, entries)


def pruned_points(plan: Plan) -> Mapping[str, int]:
    """How many points of each cell a search has stopped early."""
    return Counter(
        cell for cell, _ in {(s.cell.id, s.point) for s in plan.slots if s.id in plan.pruned}
    )


def _digests(slot: Slot) -> dict[str, str]:
    spec = slot.spec
    tested = spec.test_dataset
    found = {"dataset": spec.dataset.digest, "backbone": spec.backbone.digest}
    return found if tested is None else {**found, "test_dataset": tested.digest}


def _unseen(slot: Slot, labels: np.ndarray) -> np.ndarray | None:
    if slot.spec.paradigm != "trzsl":
        return None
    _, unseen = seen_unseen(len(slot.spec.classnames), slot.spec.class_seed)
    return np.isin(labels, unseen)


def flat_of(slot: Slot) -> dict[str, Any]:
    """All settings of a slot, by their dotted names."""
    return {**slot.cell.flat, **slot.params, **slot.seeds}


def settings_of(slot: Slot) -> dict[str, Any]:
    """What the sweep varies in a slot, beside what a table has columns for and the seeds.

    In the order of the file, which a ledger that was read back does not keep.
    """
    chosen = {name: value for name, value in slot.cell.chosen.items() if name not in NAMED}
    searched = {one.key: None for one in slot.cell.space if one.key in slot.params}
    return {**chosen, **searched, **slot.params}


def _objectives(
    done: Sequence[tuple[Slot, TrialRecord]], objective: str | None, runs: int
) -> dict[tuple[str, int], float]:
    """Mean objective over the runs of each point; a point that lacks a run has none."""
    if objective is None:
        return {}
    values: dict[tuple[str, int], list[float]] = {}
    for slot, record in done:
        values.setdefault((slot.cell.id, slot.point), []).append(record.objectives[objective])
    return {point: fmean(found) for point, found in values.items() if len(found) == runs}


# ---------------------------------------------------------------- frames

CURVES = ("trial", "metric", "iteration", "value")


def trials_frame(plan: Plan, store: ArtifactStore, event_log: EventLog) -> DataFrame:
    """One line for each trial whose point is known, in the order of the plan.

    Columns: `trial` (its name in the ledger) and `key` (12 digits), both of which `airsweep diff`
    takes; `cell`, `point`; dataset to method; every setting that the sweep varies; the seeds;
    `state` (done, reused, pruned, failed, running, waiting), `failure` and `message` of failed
    ones; `seconds` and every metric, NaN where a trial has none.
    """
    from pandas import DataFrame

    found = standing(event_log)
    alive = "running" in found.last.values() and event_log.is_locked()
    records = {slot.id: record for slot, record in finished(plan, store)}
    settings = dict.fromkeys(key for slot in plan.slots for key in _settings(slot))
    lines = []
    for slot in plan.slots:
        record = records.get(slot.id)
        state = found.last.get(slot.id, "waiting")
        if state not in ("done", "reused", "pruned", "failed"):
            state = "running" if alive and state == "running" else "waiting"
            state = "reused" if record is not None else state  # as the next run would say
        failure = found.failures.get(slot.id, {}) if state == "failed" else {}
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
    """One line for each value of each curve: `trial`, `metric`, `iteration` from 0, `value`.

    Trials that learn nothing have no curves.
    """
    from pandas import DataFrame

    lines = [
        (slot.id, metric, iteration, value)
        for slot, record in finished(plan, store)
        for metric, values in record.curves.items()
        for iteration, value in enumerate(values)
    ]
    return DataFrame(lines, columns=list(CURVES))


def _settings(slot: Slot) -> dict[str, Any]:
    named = {name: slot.cell.flat.get(name) for name in NAMED if name != "method"}
    named = {name: value for name, value in named.items() if value is not None}
    return {**named, "method": slot.cell.method, **settings_of(slot)}


# ---------------------------------------------------------------- how a sweep stands


@dataclass
class Standing:
    """How a sweep stands, by its ledger alone."""

    total: int = 0
    last: dict[str, str] = field(default_factory=dict)  # slot -> its state
    failures: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    prepared: Counter[str] = field(default_factory=Counter)
    unmade: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # artifacts, by key
    waiting_for: dict[str, int] = field(default_factory=dict)  # units of artifacts that are left
    waiting_cells: tuple[str, ...] = ()
    retried: Counter[str] = field(default_factory=Counter)  # by failure class, in the last run
    exit_code: int | None = None

    def counts(self, alive: bool, among: Collection[str] | None = None) -> dict[str, int]:
        """Trials by state; what a dead driver was running is waiting again.

        Args:
            among: slots that are asked for now; None: all that ever were.
        """
        counts = Counter(
            state for slot, state in self.last.items() if among is None or slot in among
        )
        running = counts["running"] if alive else 0
        ended = {name: counts[name] for name in ("done", "reused", "pruned", "failed")}
        return {
            **ended,
            "running": running,
            "waiting": max(0, self.total - sum(ended.values()) - running),
        }


def standing(event_log: EventLog) -> Standing:
    """Fold the ledger."""
    found = Standing()
    for event in event_log.events():
        match event["event"]:
            case "sweep_started":
                found.total, found.exit_code = event["total"], None
                found.retried, found.unmade = Counter(), {}
                found.waiting_for, found.waiting_cells = {}, ()
            case "cells_waiting":
                found.waiting_for = dict(event["artifacts"])
                found.waiting_cells = tuple(event["cells"])
            case "cells_ready":
                found.waiting_for, found.waiting_cells = {}, ()
            case "artifact_failed":
                found.unmade[event["key"]] = event
            case "artifact_retried" | "trial_retried":
                found.retried[event["failure_class"]] += 1
            case "trials_started":
                found.last |= dict.fromkeys(event["slots"], "running")
            case "rung_reached":
                found.last[event["slot"]] = "waiting"  # for the other points of its round
            case "trial_done" | "trial_reused" | "trial_failed" | "trial_pruned" as name:
                found.last[event["slot"]] = name.removeprefix("trial_")
                found.failures.pop(event["slot"], None)
                if name == "trial_failed":
                    found.failures[event["slot"]] = event
            case "search_ended":
                found.total -= event["trials_left"]
            case "artifact_prepared":
                found.prepared[event["stage"]] += 1
                if event["key"] in found.waiting_for:
                    found.waiting_for[event["key"]] -= 1
            case "sweep_ended":
                found.exit_code = event["exit_code"]
    return found
