"""State of one `run_sweep` call, and the handlers of its events."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.cluster import session
from orchestrator.errors import FAILED, INTERRUPTED, StoreFull
from orchestrator.execution.screen import Screen
from orchestrator.failures import CLASSES, Failure
from orchestrator.formatting import plural
from orchestrator.planning import (
    Outcome,
    OutcomeTracker,
    Requirement,
    Resolver,
    Slot,
    artifact_title,
    contains_spec,
    ray_resources,
    requirements_of,
)
from orchestrator.planning.estimate import START, Measured, Work, stage_work, trial_work
from orchestrator.planning.plan import PlannedSlot
from orchestrator.planning.requirements import STAGE_TITLES
from orchestrator.planning.resources import format_amount
from orchestrator.spec import Resources, SweepSpec
from orchestrator.stages import FeaturesSpec, TrialSpec
from orchestrator.stages.dataset_text import unused_images
from orchestrator.store import EventLog, SweepLocation
from orchestrator.store.checkpoints import Curves

if TYPE_CHECKING:
    from orchestrator.cluster.session import MemoryPeak
    from orchestrator.execution._allocation import Allocation, PoolStatistics
    from orchestrator.execution._progress import ProgressMonitor


MIN_STALL = 60.0  # seconds without a process that works, after which a wait has a reason


@dataclass
class RunStatistics:
    """Figures of a run for the closing lines of its screen; `outcome.json` has most of them."""

    started: float = field(default_factory=time.monotonic)
    walls: dict[str, float] = field(default_factory=dict)  # seconds by phase
    work: dict[str, Measured] = field(default_factory=dict)  # by stage and kind
    drawn: int = 0
    redrawn: int = 0
    holes: int = 0
    states: dict[str, int] = field(default_factory=dict)
    overheads: list[float] = field(default_factory=list)
    pools: list[dict[str, Any]] = field(default_factory=list)  # fields of `PoolStatistics`
    memory: int = 0  # bytes
    memory_of: str = ""  # the measured processes, if they are not all of the run
    shares: dict[str, float] = field(default_factory=dict)  # recognised by CLIP, by group

    def add_wall(self, phase: str, seconds: float) -> None:
        self.walls[phase] = self.walls.get(phase, 0.0) + seconds

    def add_work(self, work: Work, seconds: float, startup: float = 0.0) -> None:
        if not self.work:
            start = time.monotonic() - self.started - seconds - startup
            self.work[START.name] = Measured(max(start, 0.0), 1.0)
        more = Measured(seconds, work.units, max(startup, 0.0), float(startup > 0))
        self.work[work.name] = self.work.get(work.name, Measured()).plus(more)


@dataclass
class RunState:
    """State of one `run_sweep` call.

    Listens to preparation, to workers and to the trial scheduler, and passes each event to the
    event log, the statistics, the tracker and the screen.
    """

    sweep: SweepSpec
    location: SweepLocation
    screen: Screen
    tracker: OutcomeTracker
    event_log: EventLog
    resolver: Resolver
    exit_code: int = FAILED  # of an unexpected exception
    statistics: RunStatistics = field(default_factory=RunStatistics)
    # None until Ray has started.
    allocation: Allocation | None = None
    progress: ProgressMonitor | None = None
    memory_peak: MemoryPeak | None = None
    # When a process last reported that it works, and when it reported more.
    worked: float = field(default_factory=time.monotonic)
    news: float = field(default_factory=time.monotonic)
    stage: str = ""  # the stage that is being prepared
    signal_exit_code: int | None = None  # after a signal
    ray_died: bool = False  # the local Ray died
    failed_requirements: list[tuple[Requirement, Failure]] = field(default_factory=list)
    slot_states: dict[str, str] = field(default_factory=dict)
    running_slots: Callable[[], Mapping[str, Slot]] = dict
    process_died: bool = False  # a worker died, so that Ray's logs may explain a failure

    def check(self) -> None:
        """Show progress, or a wait with its reason. Called about ten times a second.

        Raises:
            KeyboardInterrupt, SystemExit: a signal came earlier, and other code dropped the
                exception of its handler, as a callback of Ray or a finalizer does.
        """
        if self.signal_exit_code is not None:
            if self.signal_exit_code == INTERRUPTED:
                raise KeyboardInterrupt
            raise SystemExit(self.signal_exit_code)
        if self.progress is not None:
            handlers: dict[str, Callable[..., None]] = {
                "progress": self.on_progress,
                "waiting": self.on_waiting,
                "working": lambda name: setattr(self, "worked", time.monotonic()),
                "curves": self.on_curves,
            }
            for (name, kind), arguments in self.progress.read().items():
                handlers[kind](name, *arguments)
            self.screen.show_wait(self._awaited, time.monotonic() - self.news)

    def _awaited(self) -> str:
        """The work that starts or runs; what it lacks, if no process of it works for long."""
        trials = len(self.running_slots())
        names = [plural(trials, "trial")] if trials else []
        if self.allocation is not None and self.allocation.preparing and self.stage:
            names.append(STAGE_TITLES[self.stage])
        text = f"waiting for {' and '.join(names) or 'the last tasks'}"
        if time.monotonic() - self.worked < MIN_STALL or not session.waits_for_resources():
            return text  # a process of the sweep works, or starts, which may take minutes
        reason = shortage(self.sweep.resources, session.free_resources())
        return f"{text}; {reason}" if reason else text

    # ---------------------------------------------------------------- preparation and progress

    def on_prepared(self, requirement: Requirement, seconds: float, facts: dict[str, Any]) -> None:
        self._take_news()
        numbers = {name: value for name, value in facts.items() if isinstance(value, int | float)}
        self.event_log.append(
            "artifact_prepared",
            stage=requirement.stage,
            key=str(requirement.key),
            seconds=round(seconds, 3),
            facts=numbers,
        )
        if isinstance(requirement.spec, FeaturesSpec) and (
            unused := unused_images(requirement.spec, self.location.store)
        ):
            self.screen.message(f"{artifact_title(requirement.key)}: not used: {unused}")
        startup = facts.get("startup", 0.0)
        # A shard that the store had measures nothing, since the fastest measurement counts.
        is_made = any(facts.get(name, 1) for name in ("drawn", "pairs", "encoded"))
        if startup is not None and is_made:
            self.statistics.add_work(stage_work(requirement.spec), seconds - startup, startup)
        if requirement.stage == "images":
            self.statistics.drawn += facts["drawn"]
            self.statistics.redrawn += facts["redrawn"]
            self.statistics.holes += facts["holes"]
        self.screen.show_prepared(requirement)

    def on_failed(self, requirement: Requirement, failure: Failure) -> None:
        self.failed_requirements.append((requirement, failure))
        self.process_died |= failure.failure_class == "infra"
        self._log_artifact("artifact_failed", requirement, failure)
        name = artifact_title(requirement.key)
        if CLASSES[failure.failure_class].stops_after == 1:
            raise StoreFull(f"{name}: {failure.message}")
        self.screen.message(f"{name}: failed ({failure.failure_class}): {failure.message}")

    def on_retried(self, requirement: Requirement, failure: Failure) -> None:
        self._log_artifact("artifact_retried", requirement, failure)
        remedy = CLASSES[failure.failure_class].remedy
        self.screen.message(f"{artifact_title(requirement.key)}: {failure.message}; {remedy}")

    def on_progress(self, name: str, done: int, total: int, unit: str) -> None:
        self._take_news()
        self.screen.show_progress(name, done, total, unit)

    def on_waiting(self, name: str, holder: str, seconds: float) -> None:
        self._take_news()
        self.screen.show_wait(lambda: f"waiting for {holder} to make it", seconds, name)

    def on_curves(self, name: str, curves: Curves, started: float) -> None:
        slot = self.running_slots().get(name.removeprefix("trial "))
        if slot is not None:
            self.tracker.running(slot, curves, started)

    def on_pool_closed(self, pool: PoolStatistics) -> None:
        self.statistics.pools.append(asdict(pool))
        self.screen.message(f"computed {pool}")

    # ---------------------------------------------------------------- callbacks of TrialScheduler

    def failed_dependency(self, trial: TrialSpec) -> Failure | None:
        """The failure of an input of a trial, because of which the trial cannot run."""
        requirements = requirements_of([trial]) if self.failed_requirements else []
        for failed, failure in self.failed_requirements:
            if any(contains_spec(requirement.spec, failed.spec) for requirement in requirements):
                message = f"{artifact_title(failed.key)} failed: {failure.message}"
                return Failure(failure.failure_class, message)
        return None

    def on_outcome(self, outcome: Outcome) -> None:
        self._take_news()
        self.slot_states[outcome.slot.id] = outcome.state
        self.statistics.states = dict(Counter(self.slot_states.values()))
        self.process_died |= outcome.failure_class == "infra"
        logged_at = None
        if not outcome.already_logged:
            logged_at = self._log_outcome(outcome)
            self._add_work(outcome)
        self.tracker.trial(outcome, logged_at)
        self.screen.show_outcome(outcome)

    def _log_outcome(self, outcome: Outcome) -> float:
        fields: dict[str, Any] = {
            "slot": outcome.slot.id,
            "cell": outcome.slot.cell.id,
            "key": outcome.slot.key.digest,
        }
        if outcome.state == "failed":
            fields |= {"failure_class": outcome.failure_class, "message": outcome.message}
        return self.event_log.append(f"trial_{outcome.state}", **fields)

    def _add_work(self, outcome: Outcome) -> None:
        """Add the work of a trial to the statistics."""
        if outcome.state == "done" and outcome.record is not None:
            record = outcome.record
            slot = outcome.slot
            assert isinstance(slot, PlannedSlot)
            spec = slot.spec
            pool = None if spec.train.steps else self.resolver.pool_size(spec)
            seeds = len(self.sweep.seeds.values)
            work, startup = trial_work(spec, seeds=seeds, pool=pool), record.startup
            if not work.units:
                startup = record.seconds
            if startup is not None:  # otherwise its steps were not measured
                self.statistics.add_work(work, record.seconds - startup, startup)

    def _take_news(self) -> None:
        self.news = self.worked = time.monotonic()

    def _log_artifact(self, event: str, requirement: Requirement, failure: Failure) -> None:
        self.event_log.append(
            event,
            key=str(requirement.key),
            stage=requirement.stage,
            failure_class=failure.failure_class,
            message=failure.message,
        )


def shortage(resources: Resources, free: Mapping[str, tuple[float, float]]) -> str:
    """The resource that a trial or a generator lacks to start; empty if there are enough.

    >>> shortage(Resources(), {"CPU": (0.0, 2.0)})
    'a trial needs 1 CPU, but 0 of 2 are free; `ray status` shows what is in use'
    """
    for name, want in (("trial", resources.trial), ("generator", resources.generator)):
        for kind, amount in ray_resources(want).items():
            left, total = free.get(kind, (0.0, 0.0))
            if left < amount:
                return (
                    f"a {name} needs {format_amount(kind, amount)} {kind}, but "
                    f"{format_amount(kind, left)} of {format_amount(kind, total)} are free; "
                    "`ray status` shows what is in use"
                )
    return ""
