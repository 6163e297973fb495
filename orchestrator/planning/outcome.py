"""The outcome of a trial, and the protocol of trackers that receive outcomes during a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from orchestrator.planning.plan import Slot
from orchestrator.planning.studies import Pruned
from orchestrator.store import TrialRecord


@dataclass(frozen=True)
class Outcome:
    """What became of a slot."""

    slot: Slot
    state: Literal["done", "reused", "failed", "pruned"]
    record: TrialRecord | None = None
    pruned: Pruned | None = None
    seconds: float = 0.0  # that a pruned trial has taken
    failure_class: str | None = None
    message: str = ""
    known: bool = False  # the ledger said so already


class OutcomeTracker(Protocol):
    """Receives the outcomes of a run while it goes on. A tracker that fails never fails the run."""

    @property
    def in_store(self) -> bool:
        """Whether it writes to a file in the store's folder, for lack of another address."""

    def check(self, reach: bool) -> None:
        """Called before any work.

        Args:
            reach: a server has to answer now.

        Raises:
            ValueError: the server refuses the credentials.
            TrackerAway: the server does not answer.
        """

    def trial(self, outcome: Outcome, at: float | None) -> None:
        """Send an outcome in the background.

        Args:
            at: seconds since the epoch at which the event log noted it; None: in an earlier run.
        """

    def catch_up(self) -> None:
        """Wait until all outcomes were sent."""

    def finish(self, code: int) -> None:
        """Send the end of the run, with its exit code."""
