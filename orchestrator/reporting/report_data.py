"""The data of a sweep's HTML report. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.planning import Plan, plan_of, refs_of
from orchestrator.planning.agreement_card import AgreementCard
from orchestrator.planning.audit_card import AuditCard
from orchestrator.planning.cards import Card, complete_rows, rows_of_sweep, stored_card
from orchestrator.planning.requests import results_command, run_command
from orchestrator.reporting.results import SweepStatus, plan_status, results_of
from orchestrator.reporting.rows import Results, Row, rows
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation, read_outcome


@dataclass(frozen=True)
class ReportData:
    """A sweep with its plan, results, status and audit cards."""

    sweep: SweepSpec
    location: SweepLocation
    plan: Plan
    results: Results
    points: Sequence[Row]  # one row per point, also for a search
    status: SweepStatus
    counts: Mapping[str, int]  # trials of the plan by state
    outcome: Mapping[str, Any]  # of the last run
    cards: Sequence[tuple[AuditCard, Path]]  # audit cards of images and their pictures
    agreements: Sequence[AgreementCard]  # of the classifiers on each pool

    def costs(self) -> dict[str, tuple[int, float]]:
        """Number of results and worker seconds by stage, without results that other sweeps made."""
        from pandas import DataFrame

        events = self.location.event_log().events()
        seconds = [
            (event["stage"], event["seconds"])
            for event in events
            if event["event"] == "artifact_prepared"
        ]
        states = self.status.last
        own = {s.key.digest for s in self.plan.slots if states.get(s.id) in ("done", "recovered")}
        trials = {trial.key: trial.seconds for trial in self.results.trials if trial.key in own}
        seconds += [("trials", value) for value in trials.values()]
        groups = DataFrame(seconds, columns=["stage", "seconds"]).groupby("stage", sort=False)
        return {stage: (len(group), group["seconds"].sum()) for stage, group in groups}

    def inputs(self) -> dict[str, str]:
        """Digests of all inputs, by kind and name."""
        digests = {}
        for slot in self.plan.slots:
            for kind, ref in refs_of(slot.spec).items():
                digests[f"{kind.replace('_', ' ')} {ref.name}"] = ref.digest
        return dict(sorted(digests.items()))

    def provenance(self, name: str) -> list[Any]:
        """Distinct values of a provenance field of the records, in order of appearance."""
        values: list[Any] = []
        for trial in self.results.trials:
            value = trial.provenance.get(name)
            if value and value not in values:
                values.append(value)
        return values


def report_data_of(sweep: SweepSpec, location: SweepLocation) -> ReportData:
    """Collect the report data of a sweep.

    Raises:
        ValueError: the sweep has no finished trial.
    """
    plan = plan_of(sweep, location)
    results = results_of(plan, location.store)
    if not results.trials:
        raise ValueError(
            f"sweep {location.full_name} has no finished trial to report "
            f"({plan.total} are planned); run `{run_command(location)}`, or see its status with "
            f"`{results_command('status', location)}`"
        )
    status = plan_status(plan, location)
    cards = _cards(sweep, location)
    pictures = [
        (card, location.folder / f"{card.name}.png")
        for card in cards
        if isinstance(card, AuditCard)
    ]
    return ReportData(
        sweep,
        location,
        plan,
        results,
        points=rows(results.trials, None),
        status=status,
        counts=status.counts(alive=False),
        outcome=read_outcome(location),
        cards=[(card, picture) for card, picture in pictures if picture.exists()],
        agreements=[card for card in cards if isinstance(card, AgreementCard)],
    )


def _cards(sweep: SweepSpec, location: SweepLocation) -> list[Card]:
    try:
        rows = complete_rows(rows_of_sweep(sweep, location), location)
    except ValueError:  # the sweep uses no diffusion model, or some inputs are still missing
        return []
    return [card for row in rows if (card := stored_card(row, location)) is not None]
