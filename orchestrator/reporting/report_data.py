"""What a finished or half-finished sweep shows, gathered for a report. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.planning import Plan, plan_of, refs_of
from orchestrator.planning.audit_card import AuditCard, audited_by, known_card, ready
from orchestrator.reporting.results import Standing, results_of, standing
from orchestrator.reporting.rows import Results, Row, rows
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation, read_outcome


@dataclass(frozen=True)
class ReportData:
    """One sweep with all that its trials left behind."""

    sweep: SweepSpec
    location: SweepLocation
    plan: Plan
    results: Results
    points: Sequence[Row]  # one row a point, also of a search
    standing: Standing
    counts: Mapping[str, int]  # of the trials that the sweep asks for, by state
    outcome: Mapping[str, Any]  # of the last run
    cards: Sequence[tuple[AuditCard, Path]]  # audit cards that were made, and their pictures

    def costs(self) -> dict[str, tuple[int, float]]:
        """Times made and seconds of one worker, by stage; of what this sweep made itself."""
        from pandas import DataFrame

        events = self.location.event_log().events()
        seconds = [
            (event["stage"], event["seconds"])
            for event in events
            if event["event"] == "artifact_prepared"
        ]
        states = self.standing.last
        own = {s.key.digest for s in self.plan.slots if states.get(s.id) == "done"}
        trials = {entry.key: entry.seconds for entry in self.results.entries if entry.key in own}
        seconds += [("trials", value) for value in trials.values()]
        groups = DataFrame(seconds, columns=["stage", "seconds"]).groupby("stage", sort=False)
        return {stage: (len(of), of["seconds"].sum()) for stage, of in groups}

    def inputs(self) -> dict[str, str]:
        """Digests of all that was read, by what and name."""
        found = {}
        for slot in self.plan.slots:
            for what, ref in refs_of(slot.spec).items():
                found[f"{what.replace('_', ' ')} {ref.name}"] = ref.digest
        return dict(sorted(found.items()))

    def made(self, name: str) -> list[Any]:
        """What the records say of their making, each once, in order of appearance."""
        found: list[Any] = []
        for entry in self.results.entries:
            value = entry.made.get(name)
            if value and value not in found:
                found.append(value)
        return found


def report_data_of(sweep: SweepSpec, location: SweepLocation) -> ReportData:
    """
    Raises:
        ValueError: no trial of it has finished.
    """
    plan = plan_of(sweep, location)
    results = results_of(plan, location.store)
    if not results.entries:
        raise ValueError(
            f"sweep {location.project}/{location.name} has no finished trial to report "
            f"({plan.total} are planned); run `airsweep run {sweep.source}`, and see "
            f"`airsweep status {location.name}`"
        )
    stands = standing(location.event_log())
    return ReportData(
        sweep,
        location,
        plan,
        results,
        points=rows(results.entries, None),
        standing=stands,
        counts=stands.counts(alive=False, among={slot.id for slot in plan.slots}),
        outcome=read_outcome(location),
        cards=_cards(sweep, location),
    )


def _cards(sweep: SweepSpec, location: SweepLocation) -> list[tuple[AuditCard, Path]]:
    try:
        rows = ready(audited_by(sweep, location), location)
    except ValueError:  # no images, or not all of them yet
        return []
    known = [(known_card(row, location), location.folder / f"{row.name}.png") for row in rows]
    return [(card, picture) for card, picture in known if card is not None and picture.exists()]
