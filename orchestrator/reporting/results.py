"""Results of a sweep, read from its ledger and the store.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from air_core.bundle.checks import CLASSIFIERS
from air_core.paradigms import seen_unseen
from orchestrator.planning.history import RESULT_STATES
from orchestrator.planning.ledger import Ledger, Slot, read_ledger
from orchestrator.planning.recorded import changed_folders
from orchestrator.reporting.comparisons import Results
from orchestrator.reporting.rows import FinishedTrial, dataset_text
from orchestrator.spec.space import first_point_text
from orchestrator.store import (
    ArtifactStore,
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


Finished = tuple[Slot, TrialRecord]


def finished_records(ledger: Ledger, store: ArtifactStore) -> Iterator[Finished]:
    """The slots with a record in the store, and the records, read one at a time."""
    slots = [slot for slot in ledger.slots if slot.key.digest in ledger.has_result]
    store.fetch(slot.key for slot in slots)
    return ((slot, read_trial(slot.key, store)) for slot in slots)


def finished_trial(slot: Slot, record: TrialRecord) -> FinishedTrial:
    """Combine a slot with its record."""
    arrays, settings = record.test_arrays(), slot.settings
    unseen = None
    if settings["paradigm"] == "trzsl":
        _, classes = seen_unseen(len(record.spec["classnames"]), settings["class_seed"])
        unseen = np.isin(arrays["labels"], classes)
    split: int | str = settings["split_seed"]
    if unseen is not None and "class_seed" not in slot.cell.flat:  # runs of a point differ in it
        split = f"{split}, class seed {settings['class_seed']}"
    return FinishedTrial(
        cell=slot.cell.id,
        method=slot.cell.method,
        flat=settings,
        settings=varied_settings(slot),
        point=slot.point,
        seed=record.spec["seed"] if slot.uses_seed else None,
        split_seed=split,
        metrics=record.metrics,
        image_ids=arrays["index"],
        predictions=arrays["predictions"],
        by_classifier={name: arrays[name] for name in CLASSIFIERS if name in arrays},
        labels=arrays["labels"],
        unseen=unseen,
        searched=frozenset(slot.params),
        first_point=first_point_text(slot.cell),
        key=record.key,
        curves=record.curves,
    )


def results_of(
    ledger: Ledger, store: ArtifactStore, records: Iterable[Finished] | None = None
) -> Results:
    """The rows of a sweep's table and the trials behind them, in the order of the ledger.

    Args:
        records: the result of `finished_records`, if the caller has it already.
    """
    about = ledger.about
    records = finished_records(ledger, store) if records is None else records
    trials, classes = list[FinishedTrial](), dict[str, int]()
    objectives: dict[tuple[str, int], list[float]] = {}  # of the runs, by cell and point
    for slot, record in records:
        trials.append(finished_trial(slot, record))
        classes[dataset_text(slot.cell.flat)] = len(ledger.tested(slot).classnames)
        if about.objective is not None:
            of_runs = objectives.setdefault((slot.cell.id, slot.point), [])
            of_runs.append(record.objectives[about.objective])
    means = {point: fmean(of) for point, of in objectives.items() if len(of) == about.runs}
    if means:
        trials = [replace(each, objective=means.get((each.cell, each.point))) for each in trials]
    return Results(trials, about.objective, classes, about.is_smoke)


def varied_settings(slot: Slot) -> dict[str, Any]:
    """The settings of a slot that the sweep varies, except `TABLE_COLUMNS` and the seeds.

    They have the order of the sweep file; parameters read from an event log do not keep it.
    """
    grid = {name: value for name, value in slot.cell.chosen.items() if name not in TABLE_COLUMNS}
    searched = {dim.key: None for dim in slot.cell.space if dim.key in slot.params}
    return {**grid, **searched, **slot.params}


# ---------------------------------------------------------------- frames

CURVES = ("trial", "metric", "iteration", "value")


def trials_frame(ledger: Ledger, store: ArtifactStore) -> DataFrame:
    """One line per trial. Points that a search has not proposed yet have no trials.

    Columns: `trial` (the slot) and `key` (12 digits), which `predictions` accepts; `cell`,
    `point`; `TABLE_COLUMNS`; every setting that the sweep varies; the seeds; `state` (done, reused,
    shared, recovered, failed, running, waiting); `failure` and `message` of failed trials;
    `seconds` and every metric, NaN where a trial has no value.
    """
    from pandas import DataFrame

    records = {slot.id: record for slot, record in finished_records(ledger, store)}
    settings = dict.fromkeys(key for slot in ledger.slots for key in _settings(slot))
    failures, lines = ledger.failures, []
    for slot in ledger.slots:
        record, failure = records.get(slot.id), failures.get(slot.id, {})
        line = {
            "trial": slot.id,
            "key": slot.key.digest[:12],
            "cell": slot.cell.id,
            "point": slot.point,
            **settings,
            **_settings(slot),
            "seed": slot.settings["seed"],
            **slot.seeds,
            "state": ledger.states[slot.id],
            "failure": failure.get("failure_class", ""),
            "message": failure.get("message", ""),
        }
        if record is not None:
            line |= {"seconds": record.seconds, **record.metrics}
        lines.append(line)
    return DataFrame(lines)


def curves_frame(ledger: Ledger, store: ArtifactStore) -> DataFrame:
    """One line per value of each curve: `trial`, `metric`, `iteration` from 0, `value`.

    Trials without training have no curves.
    """
    from pandas import DataFrame

    lines = [
        (slot.id, metric, iteration, value)
        for slot, record in finished_records(ledger, store)
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
    `airsweep table` reports; the state is `damaged` if it is the event log. `changed` has sentences
    on folders of images that have changed since.
    """
    return [_overview(location) for location in recorded_locations(store)]


def _overview(location: SweepLocation) -> dict[str, Any]:
    entry = {"sweep": location.full_name, "options": "", "state": "damaged", "finished": 0}
    entry |= {"failed": 0, "total": 0, "last_event": None, "best": [], "changed": []}
    with suppress(ValueError, OSError):
        ledger = read_ledger(location)
        state = read_outcome(location).get("state", "unknown")
        state = "killed" if ledger.history.exit_code is None else state
        state = "removed" if ledger.removed else state
        counts = ledger.counts
        entry |= {
            "options": ledger.about.options,
            "state": "running" if ledger.alive else state,
            "finished": sum(counts[state] for state in RESULT_STATES),
            "failed": counts["failed"],
            "total": ledger.total,
            "last_event": ledger.history.last,
            "changed": [*changed_folders(ledger, location)],
        }
        results = results_of(ledger, location.store)
        entry["best"] = [
            found.as_json() | {"at_chance": results.is_at_chance(found.row, found.test)}
            for found in results.best_classifiers.values()
        ]
    return entry


# ---------------------------------------------------------------- status


def holes_text(images: Mapping[str, int]) -> str:
    """Synthetic images that no trial reads; empty if there are none.

    >>> holes_text({"drawn": 14, "holes": 2})
    '2 of 16 synthetic images given up, blank or unreadable'
    """
    holes = images["holes"]
    total = images["drawn"] + holes
    text = f"{holes:,} of {total:,} synthetic images given up, blank or unreadable"
    return text if holes else ""
