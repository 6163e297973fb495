"""What a changed file makes of what its sweep has done. Knows keys, not trials."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.keys import digest
from orchestrator.ledger import Ledger
from orchestrator.space import study_name
from orchestrator.studies import Opening
from orchestrator.sweep import Cell, SweepSpec


@dataclass(frozen=True)
class Edit:
    """What a changed file makes of what its sweep has done."""

    kept: int  # trials that this sweep has and still asks for
    reused: int  # others that are there already
    added: int  # to run
    dropped: int  # trials that are no longer asked for
    carried: int  # points of a search that are points of the new space, and count
    left_out: int  # points that are not

    def __str__(self) -> str:
        text = f"edited: keeps {self.kept} trials, reuses {self.reused}, adds {self.added}"
        if self.dropped:
            text += f"; {self.dropped} are no longer asked for"
        if self.carried or self.left_out:
            text += f"; of the points searched so far {self.carried} fit the new space and count"
            text += f", {self.left_out} do not"
        return text


def what_it_asks(sweep: SweepSpec, cells: Sequence[Cell]) -> str:
    """A digest of the trials that a sweep asks for: a comment or a budget changes nothing."""
    search = sweep.search
    studies = [study_name(c, search) if search and c.space else [c.id, c.flat] for c in cells]
    points = search.points if search else 1
    return digest([studies, points, list(sweep.seeds.assignments())])


def edit_of(
    asks: str,
    there: Sequence[str],
    ready: int,
    total: int,
    openings: Iterable[Opening],
    ledger: Ledger,
) -> Edit | None:
    """What becomes of a sweep's trials; None: its file asks for what it asked for before.

    Args:
        asks: from `what_it_asks`.
        there: keys of trials that are asked for and in the store.
        ready: how many of all that are asked for need not be run.
    """
    if _asked_before(ledger) in (None, asks):
        return None
    ended = ("trial_done", "trial_reused")
    own = {event["key"] for event in ledger.events() if event["event"] in ended}
    kept = sum(key in own for key in there)
    openings = list(openings)
    return Edit(
        kept=kept,
        reused=ready - kept,
        added=total - ready,
        dropped=len(own.difference(there)),
        carried=sum(len(one.carried) for one in openings),
        left_out=sum(one.left_out for one in openings),
    )


def _asked_before(ledger: Ledger) -> str | None:
    """The same of the sweep's last run."""
    starts = [event for event in ledger.events() if event["event"] == "sweep_started"]
    return starts[-1].get("asks") if starts else None
