"""What a run may still spend. An expected cost is reserved before anything starts.

Expected is what the trials of the same cell took in this run, else its other trials, else the
mean in the store's history, else nothing: where nothing was measured, only what is spent counts.
What has started is never cut off, so work that takes longer than expected overspends by that much.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from orchestrator.planning.estimate import stage_work
from orchestrator.planning.plan import Requirement
from orchestrator.spec import Resources
from orchestrator.spec.sweep import Budget
from orchestrator.store import ArtifactStore

HOUR = 3600.0


@dataclass
class BudgetTracker:
    """One run's budget: what is spent and what is expected."""

    budget: Budget
    resources: Resources
    history: Mapping[str, float] = field(default_factory=dict)  # mean seconds of a unit, by stage
    started: float = field(default_factory=time.monotonic)
    gpu_seconds: float = 0.0
    trials: dict[str, list[float]] = field(default_factory=dict)  # seconds by cell
    refusal: str = ""  # why something did not start, for people

    def trial_ended(self, cell: str, seconds: float) -> None:
        self.trials.setdefault(cell, []).append(seconds)
        self.gpu_seconds += seconds * self.resources.trial.gpu

    def prepared(self, stage: str, seconds: float) -> None:
        self.gpu_seconds += seconds * self.resources.want(stage).gpu

    def trial_pruned(self, seconds: float) -> None:
        """It cost something, and says nothing of what a whole trial takes."""
        self.gpu_seconds += seconds * self.resources.trial.gpu

    def can_start(self, under_way: Sequence[tuple[str, float]]) -> bool:
        """May another job start?

        Args:
            under_way: (cell, trials) of the jobs that would run, the new one last. A job runs its
                trials one after the other, beside the others. One that stops at a rung counts by
                the share of its iterations.
        """
        *_, (cell, count) = under_way
        together = sum(self.expected(each) * trials for each, trials in under_way)
        return self._fits("the next point", self.expected(cell) * count, together, "trial")

    def affords_preparing(
        self, requirements: Sequence[Requirement], store: ArtifactStore, workers: int
    ) -> bool:
        """May what is missing be made, on so many workers?"""
        left = [
            (requirement.spec, requirement.total() - requirement.have(store))
            for requirement in requirements
        ]
        works = [stage_work(spec, count) for spec, count in left if count]
        work = sum(one.units * self.history.get(one.stage, 0.0) for one in works)
        if not works:
            return True
        return self._fits("what has to be made first", work / max(workers, 1), work, "generator")

    def expected(self, cell: str) -> float:
        """Seconds of one trial."""
        every = [seconds for of in self.trials.values() for seconds in of]
        known = self.trials.get(cell) or every
        return fmean(known) if known else self.history.get("trials", 0.0)

    def _fits(self, what: str, clock: float, work: float, kind: str) -> bool:
        elapsed = time.monotonic() - self.started
        gpu = work * getattr(self.resources, kind).gpu
        for name, allowed, spent, needed, unit, size in (
            ("wall", self.budget.wall, elapsed, clock, "s", 1.0),
            ("gpu_hours", _seconds(self.budget.gpu_hours), self.gpu_seconds, gpu, "h", HOUR),
        ):
            if allowed is not None and (spent >= allowed or spent + needed > allowed):
                self.refusal = (
                    f"budget.{name}: {_short(spent / size)} of {_short(allowed / size)} {unit} are "
                    f"spent and {what} needs about {_short(needed / size)} {unit} more; "
                    f"run again to go on, or raise budget.{name}"
                )
                return False
        return True


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else HOUR * hours


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
