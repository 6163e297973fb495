"""Trials, curves and rows of a sweep as pandas DataFrames. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.ledger import Ledger
from orchestrator.plan import Plan, Slot
from orchestrator.report import Row
from orchestrator.results import NAMED, finished, settings_of, standing
from orchestrator.store import ArtifactStore
from orchestrator.trial import TrialRecord

if TYPE_CHECKING:
    from pandas import DataFrame

# What a frame has even where the sweep has no trial yet.
ALWAYS = ("dataset", "paradigm", "modality", "method")
TRIALS = ("trial", "key", "cell", "point", *ALWAYS, "seed", "state", "failure", "message")
CURVES = ("trial", "metric", "iteration", "value")


def trials_frame(plan: Plan, store: ArtifactStore, ledger: Ledger) -> DataFrame:
    """One line for each trial whose point is known, in the order of the plan.

    Columns: `trial` (its name in the ledger) and `key` (12 digits), both of which `airsweep diff`
    takes; `cell`, `point`; dataset to method; every setting that the sweep varies; the seeds;
    `state` (done, reused, pruned, failed, running, waiting), `failure` and `message` of failed
    ones; `seconds` and every metric, NaN where a trial has none.
    """
    found = standing(ledger)
    alive = "running" in found.last.values() and ledger.busy()
    records = _records(plan, store)
    settings = _keys(map(_settings, plan.slots))
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
    return _frame(lines, TRIALS)


def curves_frame(plan: Plan, store: ArtifactStore) -> DataFrame:
    """One line for each value of each curve: `trial`, `metric`, `iteration` from 0, `value`.

    Trials that learn nothing have no curves.
    """
    records = _records(plan, store)
    lines = [
        {"trial": slot, "metric": metric, "iteration": iteration, "value": value}
        for slot, record in records.items()
        for metric, values in record.curves.items()
        for iteration, value in enumerate(values)
    ]
    return _frame(lines, CURVES)


def rows_frame(rows: Sequence[Row]) -> DataFrame:
    """The rows of a table, fractions in [0, 1]: settings as columns, then n, n_test, mean, std,
    low, high and what the interval is."""
    settings = _keys(row.settings for row in rows)
    lines = []
    for row in rows:
        line: dict[str, Any] = {}
        for name, value in row.as_json().items():
            if name == "settings":
                line |= settings | value
            elif not isinstance(value, dict | list):  # no value of one cell
                line[name] = value
        lines.append(line)
    return _frame(lines, (*ALWAYS, "n", "n_test", "mean", "std", "low", "high"))


def _records(plan: Plan, store: ArtifactStore) -> dict[str, TrialRecord]:
    """By slot; a trial that was pruned ran for another count of iterations and is no candidate."""
    return {slot.id: record for slot, record in finished(plan, store)}


def _settings(slot: Slot) -> dict[str, Any]:
    named = {name: slot.cell.flat.get(name) for name in NAMED if name != "method"}
    named = {name: value for name, value in named.items() if value is not None}
    return {**named, "method": slot.cell.method, **settings_of(slot)}


def _frame(lines: Sequence[dict[str, Any]], always: Sequence[str]) -> DataFrame:
    """Columns in the order of their first appearance; `always` where there is no line."""
    # A second of imports, for those alone who ask for a frame.
    from pandas import DataFrame

    return DataFrame(lines) if lines else DataFrame(columns=list(always))


def _keys(of: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """All keys once, so that every line has a value for each."""
    return dict.fromkeys(key for one in of for key in one)
