"""What the event log of a sweep says, read in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.store import EventLog

# Where the result of a trial comes from: this sweep computed it; another sweep did; another trial
# of this sweep has the same key; this sweep computed it and was stopped before it recorded that.
ResultState = Literal["done", "reused", "shared", "recovered"]
RESULT_STATES: dict[ResultState, str] = {
    "done": "done",
    "reused": "reused from another sweep",
    "shared": "shared with another trial",
    "recovered": "recovered after a stop",
}
Ended = Literal["done", "reused", "failed"]
IMAGE_COUNTS = ("drawn", "redrawn", "holes")
MADE = ("user", "commit")  # of a run


def results_text(results: Mapping[Any, int]) -> str:
    """Numbers of results by state in words.

    >>> results_text({"done": 3, "reused": 0, "shared": 2, "recovered": 0})
    '3 done, 2 shared with another trial'
    """
    return ", ".join(
        f"{results[state]} {words}"
        for state, words in RESULT_STATES.items()
        if results[state] or state == "done"
    )


@dataclass
class History:
    """The events of a sweep in the form in which others need them; `read_history` makes it."""

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)  # last event, by slot
    started: set[str] = field(default_factory=set)  # slots of trials without an outcome
    suggested: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # by study
    points: list[dict[str, Any]] = field(default_factory=list)  # events, of the last run
    prepared: Counter[str] = field(default_factory=Counter)  # artifacts, by stage
    images: Counter[str] = field(default_factory=Counter)  # IMAGE_COUNTS
    made: dict[str, str] = field(default_factory=dict)  # MADE, of the last run
    begun: float = 0.0  # of the last run, in seconds since the epoch
    last: float | None = None  # time of the last event
    computed: int = 0  # trials that the last run computed
    failed_artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by key
    pending_artifacts: dict[str, int] = field(default_factory=dict)  # units left to make, by key
    waiting_cells: tuple[str, ...] = ()  # cells that need a pending artifact
    retried: Counter[str] = field(default_factory=Counter)  # by failure class, in the last run
    exit_code: int | None = None  # of the last run; None: it runs, or was killed
    # Slot that first had a result, and its state: by key.
    first: dict[str, tuple[str, ResultState]] = field(default_factory=dict)

    def result(self, slot: str, key: str) -> ResultState:
        """State of a result that the store has."""
        found: ResultState = "recovered" if slot in self.started else "reused"
        owner, state = self.first.setdefault(key, (slot, found))
        return state if owner == slot else "shared"

    def ended(self, slot: str, key: str) -> Ended | None:
        """Logged end of the trial with this key; None: it has none."""
        event = self.outcomes.get(slot)
        if event is None or event["key"] != key:
            return None
        ended: Ended = event["event"].removeprefix("trial_")
        return ended

    def assign(self, planned: Mapping[str, str]) -> None:
        """Assign results to the slots of a plan, if an edit moved them to other slots.

        Args:
            planned: keys of the planned trials, by slot.
        """
        for slot, key in planned.items():
            if key in self.first and planned.get(self.first[key][0]) != key:
                self.first[key] = (slot, self.first[key][1])

    def _read(self, event: dict[str, Any]) -> None:
        self.last = max(self.last or 0.0, event["time"])
        match event["event"]:
            case "sweep_started":
                self.made = {name: event.get(name, "") for name in MADE}
                self.begun, self.exit_code, self.computed = event["time"], None, 0
                self.points = []
                self.retried, self.failed_artifacts = Counter(), {}
                self.pending_artifacts, self.waiting_cells = {}, ()
            case "cells_waiting":
                self.pending_artifacts = dict(event["artifacts"])
                self.waiting_cells = tuple(event["cells"])
            case "cells_ready":
                self.pending_artifacts, self.waiting_cells = {}, ()
            case "artifact_failed":
                self.failed_artifacts[event["key"]] = event
            case "artifact_retried" | "trial_retried":
                self.retried[event["failure_class"]] += 1
            case "point_asked":
                self.suggested.setdefault(event["study"], {})[event["point"]] = event["params"]
                self.points.append(event)
            case "trials_started":
                self.started.update(event["slots"])
            case "trial_done" | "trial_reused" | "trial_failed" as name:
                slot, key = event["slot"], event["key"]
                self.outcomes[slot] = event | {"maker": self.made}
                if name == "trial_done":
                    self.first[key] = (slot, "done")
                    self.computed += 1
                elif name == "trial_reused":
                    self.result(slot, key)
                self.started.discard(slot)
            case "artifact_prepared":
                self.prepared[event["stage"]] += 1
                counts = event.get("facts", {}) if event["stage"] == "images" else {}
                self.images.update({name: counts.get(name, 0) for name in IMAGE_COUNTS})
                if event["key"] in self.pending_artifacts:
                    self.pending_artifacts[event["key"]] -= 1
            case "sweep_ended":
                self.exit_code = event["exit_code"]


def read_history(event_log: EventLog) -> History:
    """Read the events of a sweep.

    Raises:
        ValueError: a line of the event log is damaged.
    """
    history = History()
    for event in event_log.events():
        history._read(event)
    return history
