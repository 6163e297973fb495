"""Budget of a run: jobs start only while their expected cost fits into what is left.

The expected seconds of a trial are the mean over the trials of its cell in this run. Without such
trials they are the mean over all trials of this run, then the mean in the store's history, then 0.
Jobs that have started are never stopped, so a job that takes longer than expected overspends.
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
    """The budget of one run and what the run has spent of it."""

    budget: Budget
    resources: Resources
    history: Mapping[str, float] = field(default_factory=dict)  # mean seconds of a unit, by stage
    started: float = field(default_factory=time.monotonic)
    gpu_seconds: float = 0.0
    trials: dict[str, list[float]] = field(default_factory=dict)  # seconds of trials, by cell
    refusal: str = ""  # message: why the last job was not started

    def record_trial(self, cell: str, seconds: float) -> None:
        self.trials.setdefault(cell, []).append(seconds)
        self.gpu_seconds += seconds * self.resources.trial.gpu

    def record_preparation(self, stage: str, seconds: float) -> None:
        self.gpu_seconds += seconds * self.resources.process_resources(stage).gpu

    def can_start(self, under_way: Sequence[tuple[str, int]]) -> bool:
        """Whether another job fits into the budget.

        Args:
            under_way: (cell, number of trials) of the jobs that would run, the new job last. Jobs
                run in parallel, the trials of a job one after another.
        """
        *_, (cell, count) = under_way
        together = sum(self.expected_seconds(each) * trials for each, trials in under_way)
        return self._fits("the next point", self.expected_seconds(cell) * count, together, "trial")

    def can_prepare(
        self, requirements: Sequence[Requirement], store: ArtifactStore, workers: int
    ) -> bool:
        """Whether the missing artifacts can be prepared by `workers` workers within the budget."""
        missing = [
            (requirement.spec, requirement.total() - requirement.have(store))
            for requirement in requirements
        ]
        works = [stage_work(spec, count) for spec, count in missing if count]
        if not works:
            return True
        seconds = sum(work.units * self.history.get(work.stage, 0.0) for work in works)
        wall = seconds / max(workers, 1)
        return self._fits("the preparation of missing artifacts", wall, seconds, "generator")

    def expected_seconds(self, cell: str) -> float:
        """Expected seconds of one trial of a cell."""
        every = [seconds for ended in self.trials.values() for seconds in ended]
        measured = self.trials.get(cell) or every
        return fmean(measured) if measured else self.history.get("trials", 0.0)

    def _fits(self, job: str, wall: float, work: float, process: str) -> bool:
        elapsed = time.monotonic() - self.started
        gpu = work * getattr(self.resources, process).gpu
        gpu_hours = self.budget.gpu_hours
        gpu_allowed = None if gpu_hours is None else HOUR * gpu_hours
        for name, allowed, spent, needed, unit, size in (
            ("wall", self.budget.wall, elapsed, wall, "s", 1.0),
            ("gpu_hours", gpu_allowed, self.gpu_seconds, gpu, "h", HOUR),
        ):
            if allowed is not None and (spent >= allowed or spent + needed > allowed):
                self.refusal = (
                    f"budget.{name}: {_short(spent / size)} of {_short(allowed / size)} {unit} are "
                    f"spent, and {job} needs about {_short(needed / size)} {unit}; "
                    f"run the sweep again to resume, or raise budget.{name}"
                )
                return False
        return True


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
