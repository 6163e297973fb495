"""Sends everything that MLflow lacks of a sweep, from the event log and the store.

Reconciling runs no trial. It compares with the runs in MLflow first, so a second call changes
nothing. Needs neither Ray nor torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from orchestrator.errors import DONE, FAILED, TrackerUnreachable
from orchestrator.formatting import plural
from orchestrator.git import UNKNOWN
from orchestrator.planning import Outcome, Plan, Slot, plan_of
from orchestrator.planning.resolve import text_digest
from orchestrator.reporting import Results, results_of, sweep_status
from orchestrator.reporting.answers import headlines
from orchestrator.reporting.charts import pictures
from orchestrator.reporting.results import finished_records
from orchestrator.reporting.rows import BEST, row_text
from orchestrator.reporting.summary import run_facts, summary, sweep_title
from orchestrator.spec import SweepSpec
from orchestrator.store import (
    ArtifactStore,
    EventLog,
    SweepLocation,
    TrialRecord,
    read_outcome,
    read_trial,
    user_name,
)
from orchestrator.tracking._child_runs import ChildRuns, group_by_setting
from orchestrator.tracking.types import Counts, Status, SweepRun
from orchestrator.tracking_uri import resolve_uri

if TYPE_CHECKING:
    from orchestrator.tracking._mlflow import MlflowTracker, SweepTracker


@dataclass(frozen=True)
class ReconcileResult:
    """The result of reconciling one sweep."""

    name: str
    counts: Counts
    missing: int  # outcomes in the event log whose records are no longer in the store
    url: str

    def line(self) -> str:
        """A summary for the screen."""
        sent, present, settings = self.counts.sent, self.counts.present, self.counts.settings
        lost = f", {self.missing} no longer in the store" if self.missing else ""
        if not (sent or settings or self.counts.sweep):
            return f"{self.name}: nothing to send ({plural(present, 'outcome')} in MLflow{lost})"
        more = f" and {plural(settings, 'setting')}" if settings else ""
        return (
            f"{self.name}: sent {plural(sent, 'outcome')}{more}; {present} already in MLflow{lost}"
        )


def make_tracker(uri: str | None, *, store: Path, project: str) -> MlflowTracker:
    """Create the tracker for a tracking URI.

    Args:
        uri: `http(s)://...` of a server or `sqlite:///<file>`. Default: MLFLOW_TRACKING_URI, or a
            database in the store's folder if that is not set.
        store: the folder of the store.
        project: runs go to the experiment `air/<project>`.

    Raises:
        ValueError: the URI is not supported, or turns tracking off.
    """
    address, database = resolve_uri(uri, store)
    from orchestrator.tracking._mlflow import MlflowTracker  # seconds to import

    return MlflowTracker(address, project=project, database=database)


def reconcile(
    sweep: SweepSpec, location: SweepLocation, tracking_uri: str | None
) -> ReconcileResult:
    """Bring MLflow up to date with one recorded sweep.

    Raises:
        ValueError: tracking is off, or MLflow denies access.
        TrackerUnreachable: MLflow does not answer, or stops answering; runs sent before that are
            kept.
        SweepBusy: a driver is running the sweep and sends its outcomes.
    """
    uri = tracking_uri or sweep.tracking_uri
    mlflow = make_tracker(uri, store=location.store.root, project=location.project)
    mlflow.check()
    event_log = location.event_log()
    event_log.lock()
    try:
        parent = sweep_run_of(sweep, location, _history(event_log).last)
        tracker = mlflow.open(parent, live=False)
        try:
            missing = sync(sweep, location, tracker, status_of(sweep_status(event_log).exit_code))
        except TrackerUnreachable as error:
            sent = plural(tracker.counts.sent, "outcome")
            raise TrackerUnreachable(
                f"{error}; sent {sent} of {location.name} before that; run this command again when "
                "MLflow answers"
            ) from error
    finally:
        event_log.unlock()
    return ReconcileResult(location.full_name, tracker.counts, missing, tracker.url())


def sync(sweep: SweepSpec, location: SweepLocation, tracker: SweepTracker, status: Status) -> int:
    """Send everything that MLflow lacks of a sweep, and end its run.

    The caller must hold the sweep's lock.

    Returns:
        The number of outcomes in the event log whose records are no longer in the store.

    Raises:
        ValueError, TrackerUnreachable: see `MlflowTracker.check`.
    """
    location = replace(location, recorded=True)
    event_log = location.event_log()
    history = _history(event_log)
    plan = plan_of(sweep, location)
    done = finished_records(plan, location.store)
    records = {slot.id: record for slot, record in done}
    missing = 0
    children = ChildRuns(sweep, tracker.sweep, location.store)
    for slot in plan.slots:
        event = history.outcomes.get(slot.id)
        if event is None:
            continue
        outcome = _outcome_of(slot, event, location.store, records.get(slot.id))
        if outcome is None:
            missing += 1
            continue
        tracker.send(children.trial(outcome, event["time"], event["maker"]))
    results = results_of(plan, location.store, done)
    best = results.best_classifiers.values()
    marked = {(b.row.cell, b.row.point): b.classifier for b in best}
    for group in group_by_setting(done):
        slot = group[0][0]
        tracker.send(children.setting(group, marked.get((slot.cell.id, slot.point), "")))
    note, files = note_and_files(plan, location, results, tracker.run.run_id)
    names = (f"{BEST}{b.classifier} of {row_text(b.row, [*b.row.settings])}" for b in best)
    tags = {"air.best_classifier": "; ".join(names)}
    tracker.finish(status, note, files, headline_metrics(results) | _cost_metrics(location), tags)
    return missing


@dataclass(frozen=True)
class _History:
    """The outcomes of a sweep as recorded in its event log."""

    outcomes: Mapping[str, Mapping[str, Any]]  # by slot: its last event, and the maker
    last: Mapping[str, Any]  # user and commit of the last run


def _history(event_log: EventLog) -> _History:
    outcomes: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {"user": user_name(), "commit": UNKNOWN, "dirty": ""}
    for event in event_log.events():
        match event["event"]:
            case "sweep_started":
                made = {name: event.get(name, value) for name, value in made.items()}
            case "trial_done" | "trial_reused" | "trial_failed":
                outcomes[event["slot"]] = {**event, "maker": made}
    return _History(outcomes, made)


def _outcome_of(
    slot: Slot, event: Mapping[str, Any], store: ArtifactStore, record: TrialRecord | None
) -> Outcome | None:
    """The outcome of a slot; None if the event is of another spec, or the record was removed."""
    if event["key"] != slot.key.digest:
        return None
    match event["event"]:
        case "trial_failed":
            return Outcome(
                slot,
                "failed",
                failure_class=event["failure_class"],
                message=event["message"],
                already_logged=True,
            )
        case "trial_done" | "trial_reused" if store.has(slot.spec):
            state: Literal["done", "reused"] = (
                "done" if event["event"] == "trial_done" else "reused"
            )
            return Outcome(slot, state, record or read_trial(slot.spec, store), already_logged=True)
    return None


# ---------------------------------------------------------------- sweep run


def status_of(code: int | None) -> Status:
    """The MLflow status for an exit code; None means that the driver was killed."""
    return "FINISHED" if code == DONE else "FAILED" if code == FAILED else "KILLED"


def sweep_run_of(sweep: SweepSpec, location: SweepLocation, made: Mapping[str, Any]) -> SweepRun:
    """The run of a sweep.

    Args:
        made: user and commit of the driver.
    """
    return SweepRun(
        sweep=location.name,
        project=location.project,
        spec_hash=text_digest(sweep.text),
        note=sweep.question,
        user=made["user"],
        commit=made["commit"],
        source=f"airsweep run {sweep.source}",
    )


def note_and_files(
    plan: Plan, location: SweepLocation, results: Results, run_id: str
) -> tuple[str, dict[str, bytes]]:
    """The Markdown note with the results of a sweep, and the files of its run.

    Args:
        run_id: of the sweep run; the note shows charts among its files.
    """
    charts = pictures(results, plan.cells)
    screen = summary(sweep_title(plan), results, run_facts(plan, location))
    note = [
        "\n\n".join(headlines(results)),  # first, since MLflow folds long notes
        *(_picture(name, run_id) for name in charts),
        plan.sweep.question,
        f"```\n{screen}\n```",
    ]
    # From the sweep's folder: contact sheet, uncommitted changes.
    patterns = ("contact_sheet.png", "uncommitted-*.diff")
    extra = [file for pattern in patterns for file in location.folder.glob(pattern)]
    files = charts | {file.name: file.read_bytes() for file in extra}
    return "\n\n".join(filter(None, note)), files


def headline_metrics(results: Results) -> dict[str, float]:
    """For each task the best classifier's accuracy, and its row's gain over control or else host.

    Fractions, with intervals. With several tasks the names begin with the task.
    """
    metrics: dict[str, float] = {}
    for task in results.tasks:
        best = results.best_classifier(task)
        gains = {} if best is None else results.comparisons_of(best.row)
        gain, shown = gains.get("control", gains.get("host")), {}
        if best is not None and best.test is not None:
            shown["best/test/accuracy"] = (best.test.mean, best.test.low, best.test.high)
        if gain is not None:
            difference = gain.difference
            low, high = difference.low, difference.high
            interval = (low, high) if gain.is_tested else (math.nan, math.nan)
            shown["gain"] = (difference.mean, *interval)
        prefix = ""
        if len(results.tasks) > 1:
            words = (Path(task[0]).name, *task[1:])  # the dataset can be a path
            prefix = re.sub(r"[^\w. -]+", "-", "-".join(words)) + "/"
        for name, values in shown.items():
            names = (f"{prefix}{name}{end}" for end in ("", "_low", "_high"))
            metrics |= zip(names, values, strict=True)
    return {name: round(value, 4) for name, value in metrics.items() if math.isfinite(value)}


def _cost_metrics(location: SweepLocation) -> dict[str, float]:
    """Seconds of each phase of the last run, and its peak of memory."""
    run = read_outcome(location).get("run", {})
    costs = {f"time/{phase}_s": seconds for phase, seconds in run.get("walls", {}).items() if phase}
    memory = run.get("memory", 0)  # bytes; 0: unknown
    return costs | ({"system/memory_peak_gib": memory / 2**30} if memory else {})


def _picture(name: str, run_id: str) -> str:
    # A relative address works under any address of the MLflow server.
    title = name.partition(".")[0].replace("_", " ")
    return f"![{title}](get-artifact?path={quote(name)}&run_uuid={run_id})"
