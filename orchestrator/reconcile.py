"""Tell a tracker all that it has missed of a sweep, from ledger and store alone.

Starts nothing and computes nothing. Said twice it changes nothing: what the tracker has is looked
up first. Needs no Ray and no torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.children import Children
from orchestrator.dispatch import Outcome
from orchestrator.ledger import Ledger
from orchestrator.lineage import UNKNOWN
from orchestrator.parent import ending_of, parent_of, status_of
from orchestrator.place import Place, recorded_names, whoami
from orchestrator.plan import Slot, plan_sweep
from orchestrator.report import counted
from orchestrator.results import standing
from orchestrator.store import ArtifactStore
from orchestrator.studies import Pruned
from orchestrator.sweep import SweepSpec
from orchestrator.tracking import Told, TrackerAway, kind_of, make_tracker, uri_of
from orchestrator.trial import read_trial


@dataclass(frozen=True)
class Reconciled:
    """What was told of one sweep, and where to look."""

    name: str
    told: Told
    gone: int  # outcomes in the ledger whose records are no longer in the store
    url: str

    def json(self) -> dict[str, Any]:
        return {
            "sweep": self.name,
            "told": self.told.told,
            "already_there": self.told.there,
            "points": self.told.points,
            "gone": self.gone,
            "parent": self.told.sweep,
            "url": self.url,
        }

    def line(self) -> str:
        """For people."""
        told, there = self.told.told, self.told.there
        gone = f", {self.gone} no longer in the store" if self.gone else ""
        if self.told.nothing:
            return f"{self.name}: nothing to tell ({there} outcomes are there{gone})"
        settings = f", {counted(self.told.points, 'setting')}" if self.told.points else ""
        end = "" if told or settings else "; its parent is brought up to date"
        return f"{self.name}: told {told}{settings}, already there {there}{gone}{end}"


def reconcile(sweep: SweepSpec, place: Place, tracking_uri: str | None) -> Reconciled:
    """Bring a tracker up to date with one recorded sweep.

    Raises:
        ValueError: there is no tracker to tell.
        TrackerAway: it does not answer, or stops answering; what was told by then is told.
        SweepBusy: the sweep runs, and its driver tells.
    """
    uri = tracking_uri or sweep.tracking_uri
    if kind_of(uri_of(uri, place.store.root)) == "none":
        raise ValueError("tracking is off here: say which tracker to tell by --tracking-uri")
    tracker = make_tracker(uri, store=place.store.root, project=place.project)
    tracker.check()
    ledger = place.ledger()
    ledger.lock()
    try:
        history = _history(ledger)
        plan = plan_sweep(sweep, place.store, place.resolver(), ledger)
        known = standing(ledger)
        parent = parent_of(sweep, place, history.last)
        gone = 0
        with tempfile.TemporaryDirectory(prefix="airsweep-") as folder:
            children = Children(sweep, parent, Path(folder), place.store)
            tracker.start(parent, live=False)
            for slot in plan.slots:
                noted = history.outcomes.get(slot.id)
                if noted is None:
                    continue
                outcome = _outcome(slot, noted, place)
                if outcome is None:
                    gone += 1
                    continue
                at = noted.get("time", history.since)
                tracker.trial(children.child(outcome, at, noted["maker"]))
            end = ending_of(sweep, place, Path(folder))
            for point in end.points:
                tracker.point(point)
            told = tracker.finish(status_of(known.exit_code), end.note, end.files)
    finally:
        ledger.unlock()
    if told.missed or told.sweep == "missed":
        raise TrackerAway(
            f"the tracker stopped answering: {told.told} outcomes of {place.name} are told, "
            f"{told.missed} and the end are not; run this again when it answers"
        )
    return Reconciled(f"{place.project}/{place.name}", told, gone, tracker.url())


def recorded(store: ArtifactStore) -> list[str]:
    """All sweeps of a store, as PROJECT/NAME."""
    return ["/".join(names) for names in recorded_names(store)]


@dataclass(frozen=True)
class _History:
    """The ledger, folded for telling."""

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


def _outcome(slot: Slot, noted: Mapping[str, Any], place: Place) -> Outcome | None:
    """What became of a slot; None: it is about another spec, or its record was removed."""
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
        case "trial_done" | "trial_reused" if place.store.has(slot.spec):
            state: Literal["done", "reused"] = (
                "done" if noted["event"] == "trial_done" else "reused"
            )
            return Outcome(slot, state, read_trial(slot.spec, place.store), known=True)
    return None
