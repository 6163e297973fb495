"""The outcome of a trial, and the protocol of trackers that receive outcomes during a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from orchestrator.planning.ledger import Slot
from orchestrator.store import TrialRecord


@dataclass(frozen=True)
class Outcome:
    """The result of a slot: its trial's record or failure."""

    slot: Slot
    state: Literal["done", "reused", "failed"]
    record: TrialRecord | None = None
    failure_class: str | None = None
    message: str = ""
    already_logged: bool = False  # the event log has this outcome already


class OutcomeTracker(Protocol):
    """Receives the outcomes of a run while it runs. A tracker that fails never fails the run."""

    @property
    def in_store(self) -> bool:
        """Whether the tracker writes to a file in the store because no address is configured."""

    def check(self, reach: bool) -> None:
        """Check the configuration before any work starts.

        Args:
            reach: whether to contact the server.

        Raises:
            ValueError: the server rejects the credentials.
            TrackerUnreachable: the server is unreachable.
        """

    def start(self) -> None:
        """Get ready in the background to send outcomes."""

    def running(self, slot: Slot, curves: Mapping[str, Sequence[float]], started: float) -> None:
        """Send the curves of a running trial in the background.

        Args:
            started: start of the trial, in seconds since the epoch.
        """

    def trial(self, outcome: Outcome, at: float | None) -> None:
        """Send an outcome in the background.

        Args:
            at: time of the event in the event log, in seconds since the epoch; None if an earlier
                run logged the outcome.
        """

    def finish(self, code: int) -> None:
        """Send the end of the run with its exit code, and all outcomes that are not sent."""

    def export(self) -> None:
        """Send what is not sent of a sweep that is complete."""
