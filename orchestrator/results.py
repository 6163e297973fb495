"""A sweep's outcomes, gathered from ledger and store for tables. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from air_core.normal import normalised
from air_core.paradigms import seen_unseen
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan, Slot
from orchestrator.report import Entry, Row, rows
from orchestrator.store import ArtifactStore
from orchestrator.trial import TrialRecord, read_trial

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


def rows_of(plan: Plan, entries: Sequence[Entry]) -> list[Row]:
    """The rows of a sweep's table: its search says by which objective points are chosen."""
    search = plan.sweep.search
    return rows(entries, search.objective if search else None, pruned_points(plan))


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


def standing(ledger: Ledger) -> Standing:
    """Fold the ledger."""
    found = Standing()
    for event in ledger.events():
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
