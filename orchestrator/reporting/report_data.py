"""The data of a sweep's HTML report. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.planning import Plan, plan_of
from orchestrator.planning.requests import results_command, run_command
from orchestrator.reporting.results import SweepStatus, plan_status, results_of
from orchestrator.reporting.rows import Results, Row, rows
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation, read_outcome


@dataclass(frozen=True)
class ReportData:
    """A sweep with its plan, results and status."""

    sweep: SweepSpec
    location: SweepLocation
    plan: Plan
    results: Results
    points: Sequence[Row]  # one row per point, also for a search
    status: SweepStatus
    counts: Mapping[str, int]  # trials of the plan by state
    outcome: Mapping[str, Any]  # of the last run


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
    return ReportData(
        sweep,
        location,
        plan,
        results,
        points=rows(results.trials, None),
        status=status,
        counts=status.counts(alive=False),
        outcome=read_outcome(location),
    )
