"""Brings MLflow up to date with a sweep: every 15 s while it runs, and at its end.

The export is idempotent: a run that MLflow has complete is skipped, so a second call sends nothing,
and a call after an outage or a kill sends the rest. It needs neither Ray nor torch. An error of
MLflow never fails a sweep.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.errors import DONE, FAILED, INTERRUPTED, TERMINATED, SweepBusy, TrackerUnreachable
from orchestrator.failures import first_line
from orchestrator.git import UNKNOWN
from orchestrator.keys import digest
from orchestrator.planning.history import read_history
from orchestrator.planning.ledger import About, Ledger, Slot, read_ledger
from orchestrator.planning.outcome import Outcome
from orchestrator.redact import without_credentials
from orchestrator.reporting import Results, results_of
from orchestrator.reporting.comparisons import BEST
from orchestrator.reporting.html_report import page
from orchestrator.reporting.notes import headlines
from orchestrator.reporting.results import finished_records
from orchestrator.reporting.rows import row_text
from orchestrator.reporting.summary import run_facts, summary, sweep_title
from orchestrator.store import EventLog, SweepLocation, user_name
from orchestrator.store.artifacts import provenance
from orchestrator.tracking._child_runs import (
    COMMIT,
    NOTE,
    RECIPE,
    USER,
    ChildRun,
    ChildRuns,
    Status,
    group_by_setting,
)
from orchestrator.tracking.database import digest_in
from orchestrator.tracking_uri import effective_uri, resolve_uri, uri_kind

if TYPE_CHECKING:
    from orchestrator.tracking._mlflow import MlflowTracker, SweepTracker

log = logging.getLogger(__name__)

INTERVAL = 15.0  # seconds
# Seconds between a failed call and the next one. A server that accepts a request and never replies
# blocks the thread for half a minute per call.
PAUSE = 300.0
STATUSES: dict[int | None, Status] = {DONE: "FINISHED", FAILED: "FAILED"}  # by exit code


class Publisher:
    """Exports one sweep to MLflow: an `OutcomeTracker`.

    While the sweep runs a thread sends the outcomes so far. It opens MLflow first, which takes
    seconds, while the inputs of the trials are prepared.

    Args:
        tracking_uri: None: the default of MLflow, else a file in the store.
    """

    def __init__(self, about: About, location: SweepLocation, tracking_uri: str | None) -> None:
        self.about, self.location, self.store = about, location, location.store
        self.uri = effective_uri(tracking_uri, self.store.root)
        self.kind = uri_kind(self.uri)
        self._live = True
        self._tracker: SweepTracker | None = None
        self._unsent: dict[tuple[str, str], ChildRun] = {}  # by kind and id
        self._thread = threading.Thread(target=self._send_regularly, daemon=True)
        self._ended = threading.Event()
        self._paused_until = 0.0
        self._warned = False

    @cached_property
    def tags(self) -> dict[str, str]:
        """Of the sweep run; read after the driver has set user and commit in the environment."""
        return sweep_tags(self.about, self.location, provenance())

    @cached_property
    def _children(self) -> ChildRuns:
        return ChildRuns(read_ledger(self.location), self.tags["air.user"])

    def _mlflow(self) -> MlflowTracker:
        from orchestrator.tracking._mlflow import MlflowTracker  # seconds to import

        return MlflowTracker(self.uri, self.store.root, self.location.project)

    @property
    def in_store(self) -> bool:
        is_default = self.uri == effective_uri(None, self.store.root)
        return is_default and not os.environ.get("MLFLOW_TRACKING_URI")

    def check(self, reach: bool) -> None:
        if self.kind != "http" or not reach:
            return
        try:
            self._mlflow().check()
        except TrackerUnreachable as error:
            raise TrackerUnreachable(
                f"{error}; start it, give another --tracking-uri, or run with --tracking-uri none: "
                "a later run with an address sends all results"
            ) from error

    def start(self) -> None:
        """Open MLflow on a thread, which sends what is queued until the end."""
        if self.kind != "none":
            self._thread.start()

    def trial(self, outcome: Outcome, at: float | None) -> None:
        """Queue an outcome. Those that an earlier run logged are sent at the end."""
        if self.kind == "none":
            return
        setting = self._children.completed_setting(outcome)
        if at is not None:
            self._queue(self._children.trial(outcome, at, provenance()))
            if setting is not None:
                self._queue(setting)

    def running(self, slot: Slot, curves: Mapping[str, Sequence[float]], started: float) -> None:
        """Queue the curves of a running trial. They replace queued ones."""
        if self.kind != "none":
            self._queue(self._children.running(slot, curves, started, provenance()))

    def export(self) -> None:
        """Send everything that MLflow lacks of an ended sweep, which no driver runs."""
        if self.kind == "none":
            return
        database = resolve_uri(self.uri, self.store.root)[1]
        if database is not None and database.exists():  # ask without importing MLflow
            place = self.location.project, self.location.name
            if digest_in(database, *place) == digest_of(self.about, self.location.event_log()):
                return
        try:
            with self.location.event_log().locked() as event_log:
                self._live, history = False, read_history(event_log)
                made = {"user": user_name(), "commit": UNKNOWN, **history.made}
                self.tags = sweep_tags(self.about, self.location, made)
                self.finish(history.exit_code)
        except (SweepBusy, PermissionError):
            pass  # its driver sends it, or its owner may

    def finish(self, code: int | None) -> None:
        """End the sweep run, and send everything that MLflow lacks.

        After SIGTERM only seconds remain, so the sweep run is ended without a note, and the next
        run of the sweep sends the rest.

        Args:
            code: the exit code; None if the driver was killed.
        """
        was_used = self._thread.is_alive()
        self._ended.set()
        if was_used:
            self._thread.join()
        status = STATUSES.get(code, "KILLED")
        if self.kind == "none" or (code == INTERRUPTED and not was_used):  # opening takes seconds
            return
        if code == TERMINATED:
            complete = self._tracker is not None and self._call(lambda t: t.finish(status))
            complete = complete and not (self._unsent or self._warned)
        else:
            self._paused_until = 0.0
            complete = self._call(lambda t: sync(self.location, t, status))
        if not complete:
            log.warning(
                "MLflow at %s lacks part of this sweep; the store has all results, and the next "
                "run of the same command sends the rest",
                without_credentials(self.uri),
            )

    def _queue(self, run: ChildRun) -> None:
        self._unsent[run.kind, run.id] = run

    def _send_regularly(self) -> None:
        self._call(self._send_queue)
        while not self._ended.wait(INTERVAL):
            self._call(self._send_queue)

    def _send_queue(self, tracker: SweepTracker) -> None:
        while self._unsent and not self._ended.is_set():
            tracker.send(self._unsent.popitem()[1])

    def _call(self, work: Callable[[SweepTracker], object]) -> bool:
        """Call MLflow; return whether the call succeeded."""
        if time.monotonic() < self._paused_until:
            return False
        try:
            if self._tracker is None:
                self._tracker = self._mlflow().open(self.tags, live=self._live)
            work(self._tracker)
        except Exception as error:  # no error of the tracker may end the sweep
            # A failed call may have written its run, so the next call reads the runs again.
            self._tracker = None
            self._paused_until = time.monotonic() + PAUSE
            if not self._warned:
                kind = "" if isinstance(error, TrackerUnreachable) else f"{type(error).__name__}: "
                log.warning("%s%s; the sweep continues without it", kind, first_line(error))
            self._warned = True
            return False
        return True


def digest_of(about: About, event_log: EventLog) -> str:
    """Of everything that an ended sweep shows in MLflow."""
    return digest([RECIPE, about.digest, about.options, event_log.path.read_text(errors="replace")])


def sync(location: SweepLocation, tracker: SweepTracker, status: Status) -> None:
    """Send everything that MLflow lacks of a sweep, and end its run.

    The caller must hold the sweep's lock.
    """
    ledger = replace(read_ledger(location), alive=False)  # the caller is its driver
    content = digest_of(ledger.about, location.event_log())
    if (tracker.run.status, tracker.run.tags.get("air.digest")) == (status, content):
        return
    done = [*finished_records(ledger, location.store)]
    records = {slot.id: record for slot, record in done}
    children = ChildRuns(ledger, tracker.sweep["air.user"])
    states: Counter[str] = Counter()
    for slot in ledger.slots:
        state = ledger.history.ended(slot.id, slot.key.digest)
        if state is not None and (state == "failed" or slot.id in records):
            states[state] += 1
            event = ledger.history.outcomes[slot.id]
            outcome = Outcome(
                slot,
                state,
                record=None if state == "failed" else records[slot.id],
                failure_class=event.get("failure_class"),
                message=event.get("message", ""),
            )
            tracker.send(children.trial(outcome, event["time"], event["maker"]))
    results = results_of(ledger, location.store, done)
    best = results.best_classifiers.values()
    marked = {(b.row.cell, b.row.point): b.classifier for b in best}
    for group in group_by_setting(done):
        slot = group[0][0]
        tracker.send(children.setting(group, marked.get((slot.cell.id, slot.point), "")))
    note, files = note_and_files(ledger, location, results)
    names = (f"{BEST}{b.classifier} of {row_text(b.row)}" for b in best)
    tags = {f"air.{state}": str(states[state]) for state in ("done", "reused", "failed")}
    tags["air.best_classifier"] = "; ".join(names)
    tags["air.digest"] = content if tracker.accepts_files else ""
    tracker.finish(status, note, files, headline_metrics(results), tags)


# ---------------------------------------------------------------- sweep run


def sweep_tags(about: About, location: SweepLocation, made: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a sweep run.

    Args:
        made: user and commit of the driver.
    """
    return {
        "air.sweep": location.name,
        "air.project": location.project,
        "air.spec_hash": about.digest,
        "air.user": made["user"],
        USER: made["user"],
        COMMIT: made["commit"],
        NOTE: about.question,
        "mlflow.source.name": f"airsweep run {about.source}",
        "mlflow.source.type": "JOB",
    }


def note_and_files(
    ledger: Ledger, location: SweepLocation, results: Results
) -> tuple[str, dict[str, bytes]]:
    """The Markdown note with the results of a sweep, and the files of its run."""
    screen = summary(sweep_title(ledger), results, run_facts(ledger, location))
    note = [*headlines(results), ledger.about.question, f"```\n{screen}\n```"]
    files = {f.name: f.read_bytes() for f in location.folder.glob("contact_sheet.png")}
    if results.trials:
        files["report.html"] = page(ledger, location, results).encode()
    return "\n\n".join(filter(None, note)), files


def headline_metrics(results: Results) -> dict[str, float]:
    """The best classifier's accuracy, and its row's gain over control or else host.

    Fractions, with intervals. None with several tasks, whose settings have theirs.
    """
    if len(results.best_classifiers) != 1:
        return {}
    [best] = results.best_classifiers.values()
    gains, shown = results.comparisons_of(best.row), {}
    if best.test is not None:
        shown["best/test/accuracy"] = (best.test.mean, best.test.low, best.test.high)
    if gain := gains.get("control", gains.get("host")):
        difference = gain.difference
        interval = (difference.low, difference.high) if gain.is_tested else ()
        shown["gain"] = (difference.mean, *interval)
    return {
        f"{name}{end}": round(value, 4)
        for name, values in shown.items()
        for end, value in zip(("", "_low", "_high"), values, strict=False)
    }
