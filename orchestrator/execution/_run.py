"""One run of the driver: what it holds, and what it does with what it is told."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from air_core.specs import TrialSpec
from orchestrator.errors import INTERRUPTED, StoreFull
from orchestrator.execution._stall import Stall
from orchestrator.execution.screen import Screen
from orchestrator.failures import CLASSES, Failure
from orchestrator.planning import (
    Outcome,
    OutcomeTracker,
    Requirement,
    Resolver,
    holds,
    name_of,
    requirements_of,
)
from orchestrator.planning.budget import BudgetTracker
from orchestrator.planning.estimate import Pace, Work, stage_work, trial_work
from orchestrator.spec import SweepSpec
from orchestrator.store import EventLog, SweepLocation

if TYPE_CHECKING:
    from orchestrator.cluster.session import MemoryPeak
    from orchestrator.execution._allocation import Allocation, Pool
    from orchestrator.execution._progress import Progress


@dataclass
class Tally:
    """What a run did, for the last lines of its screen."""

    started: float = field(default_factory=time.monotonic)
    walls: dict[str, float] = field(default_factory=dict)  # seconds by phase
    # Seconds and units by stage and kind.
    work: dict[tuple[str, str], Pace] = field(default_factory=dict)
    drawn: int = 0
    redrawn: int = 0
    holes: int = 0
    states: dict[str, int] = field(default_factory=dict)
    overheads: list[float] = field(default_factory=list)
    pools: list[dict[str, float]] = field(default_factory=list)  # of generators, see shares.Pool
    memory: int = 0  # bytes
    shares: dict[str, float] = field(default_factory=dict)  # what CLIP recognises, by group

    def add_wall(self, phase: str, seconds: float) -> None:
        self.walls[phase] = self.walls.get(phase, 0.0) + seconds

    def add_work(self, work: Work, seconds: float, startup: float = 0.0) -> None:
        pace = Pace(seconds, work.units, max(startup, 0.0), float(startup > 0))
        before = self.work.get((work.stage, work.kind), Pace(0.0, 0.0))
        self.work[work.stage, work.kind] = before + pace


@dataclass
class Run:
    """One run of the driver."""

    sweep: SweepSpec
    location: SweepLocation
    screen: Screen
    tracker: OutcomeTracker
    event_log: EventLog
    resolver: Resolver
    budget_tracker: BudgetTracker
    tally: Tally = field(default_factory=Tally)
    joined: bool = False  # a cluster that was there, of perhaps many machines
    # None before Ray has started.
    allocation: Allocation | None = None
    progress: Progress | None = None
    peak: MemoryPeak | None = None
    stall: Stall | None = None
    stage: str = ""  # that is being prepared
    stopped: int | None = None  # exit code, once a signal came
    lost: bool = False  # the local Ray died
    failed_requirements: list[tuple[Requirement, Failure]] = field(default_factory=list)
    given_up: dict[str, Failure] = field(default_factory=dict)  # by slot: not tried again
    moving: list[TrialSpec] = field(default_factory=list)  # go on in fp32
    last: dict[str, str] = field(default_factory=dict)  # state by slot
    died: bool = False  # something failed since its process died: Ray's logs may tell why

    def news(self) -> None:
        """Something has happened."""
        if self.stall is not None:
            self.stall.news()

    def check(self) -> None:
        """Show progress, and why nothing happens. Called about ten times a second.

        Raises:
            KeyboardInterrupt, SystemExit: a signal came, and what its handler raised was dropped,
                as a callback of Ray or a finalizer does.
        """
        if self.stopped is not None:
            raise KeyboardInterrupt if self.stopped == INTERRUPTED else SystemExit(self.stopped)
        if self.progress is not None and self.stall is not None:
            self.progress.read()
            self.stall.check()

    # progress.Watcher

    def prepared(self, requirement: Requirement, seconds: float, facts: dict[str, Any]) -> None:
        self.news()
        plain = {name: value for name, value in facts.items() if isinstance(value, int | float)}
        self.event_log.append(
            "artifact_prepared",
            stage=requirement.stage,
            key=str(requirement.key),
            seconds=round(seconds, 3),
            facts=plain,
        )
        startup = facts.get("startup", 0.0)
        if startup is not None:
            self.tally.add_work(stage_work(requirement.spec), seconds - startup, startup)
        self.budget_tracker.prepared(requirement.stage, seconds)
        if requirement.stage == "images":
            self.tally.drawn += facts["drawn"]
            self.tally.redrawn += facts["redrawn"]
            self.tally.holes += facts["holes"]
        self.screen.prepared(requirement)

    def failed(self, requirement: Requirement, failure: Failure) -> None:
        self.failed_requirements.append((requirement, failure))
        self.died |= failure.failure_class == "infra"
        self.event_log.append(
            "artifact_failed", key=str(requirement.key), **_said(requirement.stage, failure)
        )
        if CLASSES[failure.failure_class].stops_after == 1:
            raise StoreFull(f"{name_of(requirement.key)}: {failure.message}")
        self.screen.say(
            f"{name_of(requirement.key)}: failed ({failure.failure_class}): {failure.message}"
        )

    def retried(self, requirement: Requirement, failure: Failure) -> None:
        self.event_log.append(
            "artifact_retried", key=str(requirement.key), **_said(requirement.stage, failure)
        )
        remedy = CLASSES[failure.failure_class].remedy
        self.screen.say(f"{name_of(requirement.key)}: {failure.message}; {remedy}")

    def progressed(self, name: str, done: int, total: int) -> None:
        self.news()
        self.screen.progress(name, done, total)

    def waiting(self, name: str, holder: str, seconds: float) -> None:
        self.news()
        self.screen.waiting(name, holder, seconds)

    def drew(self, pool: Pool) -> None:
        self.tally.pools.append(asdict(pool))
        self.screen.say(f"drew {pool}")

    # Outcomes and lost hopes, for orchestrator.execution._scheduler.

    def failed_dependency(self, trial: TrialSpec) -> Failure | None:
        """Why a trial cannot run: something that it reads could not be made."""
        requirements = requirements_of([trial]) if self.failed_requirements else []
        for requirement, failure in self.failed_requirements:
            if any(holds(one.spec, requirement.spec) for one in requirements):
                message = f"{name_of(requirement.key)} failed: {failure.message}"
                return Failure(failure.failure_class, message)
        return None

    def outcome(self, outcome: Outcome) -> None:
        self.news()
        self.last[outcome.slot.id] = outcome.state  # one that moved to fp32 comes twice
        self.tally.states = dict(Counter(self.last.values()))
        told = None
        self.died |= outcome.failure_class == "infra" and not outcome.known
        if not outcome.known:
            fields: dict[str, Any] = {
                "slot": outcome.slot.id,
                "cell": outcome.slot.cell.id,
                "key": outcome.slot.key.digest,
            }
            if outcome.pruned is not None:
                fields |= {"rung": outcome.pruned.rung, "value": outcome.pruned.value}
                self.budget_tracker.trial_pruned(outcome.seconds)
            if outcome.state == "failed":
                fields |= {"failure_class": outcome.failure_class, "message": outcome.message}
            told = self.event_log.append(f"trial_{outcome.state}", **fields)
        if outcome.state == "done" and not outcome.known and outcome.record is not None:
            self.tally.add_work(trial_work(outcome.slot.spec), outcome.record.seconds)
            self.budget_tracker.trial_ended(outcome.slot.cell.id, outcome.record.seconds)
        self.tracker.trial(outcome, told)
        self.screen.outcome(outcome)


def _said(stage: str, failure: Failure) -> dict[str, str]:
    return {
        "stage": stage,
        "failure_class": failure.failure_class,
        "message": failure.message,
    }
