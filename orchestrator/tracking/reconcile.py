"""A sweep as a run of MLflow, and all that MLflow lacks of it, from event log and store alone.

Starts nothing and computes nothing. A second time it changes nothing: runs are looked up first.
Needs no Ray and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from orchestrator.errors import DONE, FAILED, TrackerAway
from orchestrator.formatting import counted
from orchestrator.git import UNKNOWN
from orchestrator.planning import Outcome, Plan, Slot, plan_of
from orchestrator.planning.resolve import text_digest
from orchestrator.planning.studies import Pruned
from orchestrator.reporting import Results, results_of, sweep_status
from orchestrator.reporting.charts import pictures
from orchestrator.reporting.results import finished_records
from orchestrator.reporting.rows import mean_std, settings_text
from orchestrator.reporting.summary import facts_of, summary, title_of
from orchestrator.spec import SweepSpec
from orchestrator.store import (
    ArtifactStore,
    EventLog,
    SweepLocation,
    TrialRecord,
    read_trial,
    whoami,
)
from orchestrator.tracking._child_runs import ChildRuns, by_point
from orchestrator.tracking.types import Counts, Status, SweepRun, make_tracker

if TYPE_CHECKING:
    from orchestrator.tracking._mlflow import SweepTracker

WORLDS = 3  # with a sentence of their own in a note


@dataclass(frozen=True)
class Reconciled:
    """What was sent of one sweep, and where to look."""

    name: str
    counts: Counts
    gone: int  # outcomes in the event log whose records are no longer in the store
    url: str

    def json(self) -> dict[str, Any]:
        return {
            "sweep": self.name,
            "told": self.counts.sent,
            "already_there": self.counts.present,
            "points": self.counts.settings,
            "gone": self.gone,
            "parent": "told" if self.counts.sweep else "there",
            "url": self.url,
        }

    def line(self) -> str:
        """For people."""
        sent, there, settings = self.counts.sent, self.counts.present, self.counts.settings
        gone = f", {self.gone} no longer in the store" if self.gone else ""
        if self.counts.nothing_sent:
            return f"{self.name}: nothing to send ({there} outcomes are there{gone})"
        more = f", {counted(settings, 'setting')}" if settings else ""
        return f"{self.name}: sent {counted(sent, 'outcome')}{more}; already there {there}{gone}"


def reconcile(sweep: SweepSpec, location: SweepLocation, tracking_uri: str | None) -> Reconciled:
    """Bring MLflow up to date with one recorded sweep.

    Raises:
        ValueError: tracking is off, or MLflow refuses us.
        TrackerAway: it does not answer, or stops answering; what was sent by then is sent.
        SweepBusy: the sweep runs, and its driver sends.
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
            gone = sync(sweep, location, tracker, status_of(sweep_status(event_log).exit_code))
        except TrackerAway as away:
            raise TrackerAway(
                f"{away}; {counted(tracker.counts.sent, 'outcome')} of {location.name} were sent "
                "before; run this again when it answers"
            ) from away
    finally:
        event_log.unlock()
    return Reconciled(f"{location.project}/{location.name}", tracker.counts, gone, tracker.url())


def sync(sweep: SweepSpec, location: SweepLocation, tracker: SweepTracker, status: Status) -> int:
    """Send what MLflow lacks of a sweep, and its end. The caller holds the sweep's lock.

    Returns:
        How many outcomes of the event log are no longer in the store.

    Raises:
        ValueError, TrackerAway: as of `Mlflow.check`.
    """
    location = replace(location, recorded=True)
    event_log = location.event_log()
    history = _history(event_log)
    plan = plan_of(sweep, location)
    done = finished_records(plan, location.store)
    records = {slot.id: record for slot, record in done}
    gone = 0
    children = ChildRuns(sweep, tracker.sweep, location.store)
    for slot in plan.slots:
        noted = history.outcomes.get(slot.id)
        if noted is None:
            continue
        outcome = _outcome(slot, noted, location.store, records.get(slot.id))
        if outcome is None:
            gone += 1
            continue
        at = noted.get("time", history.since)
        tracker.send(children.trial(outcome, at, noted["maker"]))
    for group in by_point(done):
        tracker.send(children.setting(group))
    results = results_of(plan, location.store, done)
    tracker.finish(status, *note_and_files(plan, location, results, tracker.run.run_id))
    return gone


@dataclass(frozen=True)
class _History:
    """What the event log says of outcomes."""

    outcomes: Mapping[str, Mapping[str, Any]]  # by slot: the last event, with who ran then
    last: Mapping[str, Any]  # who ran last: user, commit
    since: float  # when the sweep was first noted, for events that do not say when they were


def _history(event_log: EventLog) -> _History:
    outcomes: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {"user": whoami(), "commit": UNKNOWN, "dirty": ""}
    for event in event_log.events():
        match event["event"]:
            case "sweep_started":
                made = {name: event.get(name, value) for name, value in made.items()}
            case "trial_done" | "trial_reused" | "trial_failed" | "trial_pruned":
                outcomes[event["slot"]] = {**event, "maker": made}
    spec = event_log.folder / "spec.yaml"
    return _History(outcomes, made, (spec if spec.exists() else event_log.path).stat().st_mtime)


def _outcome(
    slot: Slot, noted: Mapping[str, Any], store: ArtifactStore, record: TrialRecord | None
) -> Outcome | None:
    """The outcome of a slot; None: it is about another spec, or its record was removed."""
    if noted["key"] != slot.key.digest:
        return None
    match noted["event"]:
        case "trial_failed":
            return Outcome(
                slot,
                "failed",
                failure_class=noted.get("failure_class"),
                message=noted.get("message", ""),
                known=True,
            )
        case "trial_pruned":
            stop = Pruned(noted["rung"], noted["value"])
            return Outcome(slot, "pruned", pruned=stop, known=True)
        case "trial_done" | "trial_reused" if store.has(slot.spec):
            state: Literal["done", "reused"] = (
                "done" if noted["event"] == "trial_done" else "reused"
            )
            return Outcome(slot, state, record or read_trial(slot.spec, store), known=True)
    return None


# ---------------------------------------------------------------- the run of a sweep


def status_of(code: int | None) -> Status:
    """An exit code as the status of a run; None: the driver was killed."""
    return "FINISHED" if code == DONE else "FAILED" if code == FAILED else "KILLED"


def sweep_run_of(sweep: SweepSpec, location: SweepLocation, made: Mapping[str, Any]) -> SweepRun:
    """A sweep as a run.

    Args:
        made: who runs it, and with which code: user, commit.
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
    """What MLflow shows of a sweep: Markdown with the answer, and charts and files.

    Args:
        run_id: of the sweep's run, whose files the note shows.
    """
    charts = pictures(results)
    screen = summary(title_of(plan), results, facts_of(plan, location))
    note = [
        "\n".join(_best(results)),  # first, since long notes are folded
        *(_picture(name, run_id) for name in charts),
        plan.sweep.question,
        f"```\n{screen}\n```",
    ]
    # Of the sweep's folder: contact sheet, audit cards, code that was not committed.
    patterns = ("contact_sheet.png", "audit-*", "uncommitted-*.diff")
    kept = [file for pattern in patterns for file in location.folder.glob(pattern)]
    files = charts | {file.name: file.read_bytes() for file in kept}
    return "\n\n".join(filter(None, note)), files


def _best(results: Results) -> Iterator[str]:
    """The row with the highest mean of each world, in a sentence."""
    for task in results.tasks[:WORLDS]:
        row = results.best(task)
        settings = settings_text(row, row.settings)
        with_settings = f" ({settings})" if settings else ""
        yield (
            f"{row.dataset}, {row.paradigm}/{row.modality}: **{row.method}**{with_settings} has "
            f"the highest mean test {row.metric.replace('_', ' ')}: {mean_std(row)} %\n"
        )


def _picture(name: str, run_id: str) -> str:
    # Relative, so that it is found wherever MLflow's pages are reached.
    title = name.partition(".")[0].replace("_", " ")
    return f"![{title}](get-artifact?path={quote(name)}&run_uuid={run_id})"
