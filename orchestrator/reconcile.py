"""Send MLflow all that it lacks of a sweep, from event log and store alone.

Starts nothing and computes nothing. A second time it changes nothing: runs are looked up first.
Needs no Ray and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.children import Children, by_point
from orchestrator.dispatch import Outcome
from orchestrator.ledger import Ledger
from orchestrator.lineage import UNKNOWN
from orchestrator.parent import note_and_files, parent_of, status_of
from orchestrator.place import Place, recorded_names, whoami
from orchestrator.plan import Slot, plan_sweep
from orchestrator.report import counted
from orchestrator.results import finished, results_of, standing
from orchestrator.store import ArtifactStore
from orchestrator.studies import Pruned
from orchestrator.sweep import SweepSpec
from orchestrator.tracking import Counts, Status, TrackerAway, make_tracker
from orchestrator.trial import TrialRecord, read_trial

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow import SweepTracker


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


def reconcile(sweep: SweepSpec, place: Place, tracking_uri: str | None) -> Reconciled:
    """Bring MLflow up to date with one recorded sweep.

    Raises:
        ValueError: tracking is off, or MLflow refuses us.
        TrackerAway: it does not answer, or stops answering; what was sent by then is sent.
        SweepBusy: the sweep runs, and its driver sends.
    """
    uri = tracking_uri or sweep.tracking_uri
    mlflow = make_tracker(uri, store=place.store.root, project=place.project)
    mlflow.check()
    ledger = place.ledger()
    ledger.lock()
    try:
        parent = parent_of(sweep, place, _history(ledger).last)
        tracker = mlflow.open(parent, live=False)
        try:
            gone = sync(sweep, place, tracker, status_of(standing(ledger).exit_code))
        except TrackerAway as away:
            raise TrackerAway(
                f"{away}; {counted(tracker.counts.sent, 'outcome')} of {place.name} were sent "
                "before; run this again when it answers"
            ) from away
    finally:
        ledger.unlock()
    return Reconciled(f"{place.project}/{place.name}", tracker.counts, gone, tracker.url())


def sync(sweep: SweepSpec, place: Place, tracker: SweepTracker, status: Status) -> int:
    """Send what MLflow lacks of a sweep, and its end. The caller holds the sweep's lock.

    Returns:
        How many outcomes of the event log are no longer in the store.

    Raises:
        ValueError, TrackerAway: as of `Mlflow.check`.
    """
    place = replace(place, recorded=True)
    ledger = place.ledger()
    history = _history(ledger)
    plan = plan_sweep(sweep, place.store, place.resolver(), ledger)
    done = finished(plan, place.store)
    records = {slot.id: record for slot, record in done}
    gone = 0
    children = Children(sweep, tracker.sweep, place.store)
    for slot in plan.slots:
        noted = history.outcomes.get(slot.id)
        if noted is None:
            continue
        outcome = _outcome(slot, noted, place.store, records.get(slot.id))
        if outcome is None:
            gone += 1
            continue
        at = noted.get("time", history.since)
        tracker.send(children.trial(outcome, at, noted["maker"]))
    for group in by_point(done):
        tracker.send(children.setting(group))
    results = results_of(plan, place.store, done)
    tracker.finish(status, *note_and_files(plan, place, results, tracker.run.run_id))
    return gone


def recorded(store: ArtifactStore) -> list[str]:
    """All sweeps of a store, as PROJECT/NAME."""
    return ["/".join(names) for names in recorded_names(store)]


@dataclass(frozen=True)
class _History:
    """What the event log says of outcomes."""

    outcomes: Mapping[str, Mapping[str, Any]]  # by slot: the last event, with who ran then
    last: Mapping[str, Any]  # who ran last: user, commit
    since: float  # when the sweep was first noted, for events that do not say when they were


def _history(ledger: Ledger) -> _History:
    outcomes: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {"user": whoami(), "commit": UNKNOWN, "dirty": ""}
    for event in ledger.events():
        match event["event"]:
            case "sweep_started":
                made = {name: event.get(name, value) for name, value in made.items()}
            case "trial_done" | "trial_reused" | "trial_failed" | "trial_pruned":
                outcomes[event["slot"]] = {**event, "maker": made}
    spec = ledger.folder / "spec.yaml"
    return _History(outcomes, made, (spec if spec.exists() else ledger.path).stat().st_mtime)


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
