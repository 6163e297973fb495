"""Estimates of the time that a sweep still needs, from measurements of earlier runs.

`history.json` in the store has seconds and units of the last runs, by stage and kind of work. A
unit is a training step of a LoRA or a trial, an image, or one pass of a dataset through CLIP. The
kind names everything that the cost of a unit depends on: model, size, dataset, method. Start-up
time, such as loading a model, is recorded separately, so that the few steps of a smoke run measure
a step without its start-up.

The fastest measurement counts: other programs on a machine make work slower, never faster. Work
of the embedded models that was never measured has a guess, work of other models none, since their
sizes differ by factors of a thousand.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from air_core.methods import EMBEDDED
from air_core.seal import sealed_json
from air_core.specs import STAGES, StageSpec, TrialSpec
from air_core.specs.conditions import trains_on_real, trains_on_synthetic, uses_auxiliary
from orchestrator.planning.resources import (
    Machine,
    process_capacity,
    side_by_side,
    this_machine,
)
from orchestrator.spec import Resources
from orchestrator.store import ArtifactStore, smoke_store
from orchestrator.store.verification import read_cache

HISTORY = "history.json"
MOST = 5  # measurements of a kind that the history keeps


@dataclass(frozen=True)
class Work:
    """A number of units of one kind.

    Args:
        jobs: parts that can run in parallel.
        starts: parts with a start-up of their own.
        alone: of trials whose seeds share each step, the kind of one seed alone.
    """

    stage: str
    kind: str
    units: float
    jobs: float = 1
    starts: float = 1
    alone: str = ""


@dataclass(frozen=True)
class Pace:
    """Measured time of one kind of work."""

    seconds: float  # total of all units, without start-up
    units: float  # 0: of a trial only the start-up was measured
    startup: float = 0.0  # total seconds of all starts
    starts: float = 0.0

    def __add__(self, more: Pace) -> Pace:
        return Pace(
            round(self.seconds + more.seconds, 3),
            self.units + more.units,
            round(self.startup + more.startup, 3),
            self.starts + more.starts,
        )

    def seconds_for(self, work: Work) -> float:
        """Expected seconds of the starts and units of some work."""
        startup = self.startup / self.starts if self.starts else 0.0
        unit = self.seconds / self.units if self.units else 0.0
        return work.starts * startup + work.units * unit


# Pace of the embedded models on one CPU core, until it is measured.
GUESS = {spec.stage: Pace(spec.guess, 1.0) for spec in STAGES}
GUESS["trials"] = Pace(0.0025, 1.0, startup=1.5, starts=1.0)
# Until the first work of a run begins: Ray, then a process with its imports.
START = ("start", "run")
GUESS["start"] = Pace(15.0, 1.0)
# Seconds that another process of a pool takes to start, at least: it imports torch and diffusers.
PROCESS_START = 10.0
# Stages whose shards a pool of generators makes.
_DRAWN = {spec.stage for spec in STAGES if spec.shard and spec.process == "generator"}
Measured = Mapping[str, Mapping[str, Sequence[Pace]]]  # by stage and kind; the newest last


@dataclass(frozen=True)
class Estimate:
    """Estimated time of all remaining work."""

    stages: Mapping[str, float]  # seconds on one worker; without those that have no estimate
    gpu_hours: float
    reason: str  # why the estimate is not calibrated; empty if it is
    sources: Mapping[str, str]  # `history`, `guess` or `unknown`, by stage
    work_wall: float | None  # seconds with all workers of this machine; None: unknown
    start: float  # seconds until the first work begins
    measurements: int  # of the kind of work that has the fewest; 0: a guess
    spread: float  # the time by the slowest measurements, as a multiple

    @property
    def is_known(self) -> bool:
        """Whether all work has a measurement or a guess."""
        return "unknown" not in self.sources.values()

    @property
    def seconds(self) -> float:
        return self.start + sum(self.stages.values())

    @property
    def wall(self) -> float | None:
        """Seconds of the run with all workers of this machine; None: unknown."""
        return None if self.work_wall is None else self.start + self.work_wall

    @property
    def source(self) -> str:
        return "guess" if self.reason else "history"

    @property
    def worthwhile_processes(self) -> int:
        """Processes whose share of the work takes longer than their start. Without a measurement,
        no GPU and no large model waits for others."""
        if not self.is_known or (self.reason and self.gpu_hours):
            return sys.maxsize
        return max(1, math.ceil(sum(self.stages.values()) / PROCESS_START))

    def json(self) -> dict[str, Any]:
        known = self.is_known
        return {
            "seconds": round(self.seconds, 1) if known else None,
            "wall": round(self.wall, 1) if known and self.wall is not None else None,
            "calibrated": not self.reason,
            "reason": self.reason,
            "source": self.source,
            "measurements": self.measurements,
            "spread": round(self.spread, 2),
            "gpu_hours": round(self.gpu_hours, 3),
            "start": round(self.start, 1),
            "stages": {stage: round(seconds, 1) for stage, seconds in self.stages.items()},
            "sources": dict(self.sources),
        }


def stage_work(spec: StageSpec, parts: float = 1) -> Work:
    """The work of building an artifact.

    Args:
        parts: shards to build, for a row; 1 for any other artifact.
    """
    kind, units = spec.work()
    return Work(spec.maker.stage, kind, parts * units, parts)


def trial_work(spec: TrialSpec, trials: float = 1, seeds: int = 1, pool: int | None = None) -> Work:
    """The work of trials like `spec`. A unit is a training step, or an epoch of unknown length.

    Args:
        trials: number of trials.
        seeds: number of trials of a point, which share their steps where `side_by_side` says so.
        pool: number of pool images; None: unknown.
    """
    labels = spec.pseudo_labels.kind if spec.supervision == "pseudo" else spec.supervision
    # A transfer trial trains nothing itself.
    rounds = 0 if spec.test_dataset is not None else spec.iterations
    steps = rounds * spec.train.steps if spec.train.steps else _steps_of_epochs(spec, pool)
    words = [spec.dataset.name, spec.backbone.name, spec.modality, labels]
    words += ["untrained" if not rounds else "in epochs" if steps is None else "in steps"]
    words += ["with auxiliary"] if uses_auxiliary(spec) else []
    words += ["on synthetic images"] if trains_on_synthetic(spec) else []
    units = rounds * spec.train.epochs if steps is None or not rounds else steps
    alone = " ".join(words)
    together = len(side_by_side([replace(spec, seed=seed) for seed in range(seeds)], "cpu")[0])
    kind = f"{alone}, {together} seeds together" if together > 1 else alone
    return Work("trials", kind, trials * units, math.ceil(trials / together), trials, alone)


def _steps_of_epochs(spec: TrialSpec, pool: int | None) -> int | None:
    """Training steps of a trial that counts epochs (`air_core.training`); None: unknown.

    Of candidate sets and of labels above a threshold, fewer images than the largest possible number
    may be selected.
    """
    classes, batch = len(spec.classnames), spec.train.batch
    if trains_on_real(spec):
        most = spec.pseudo_labels.k * classes if spec.pseudo_labels.growth == "fixed" else pool
        grows = spec.pseudo_labels.growth == "growing"
    elif spec.supervision == "labelled":
        most, grows = (spec.shots * classes if spec.paradigm == "ssl" else None), False
    else:
        most, grows, batch = spec.images_per_class * classes, False, spec.train.synthetic_batch
    if most is None:
        return None
    rounds = range(1, spec.iterations + 1)
    images = [most * number // spec.iterations if grows else most for number in rounds]
    return sum(spec.train.epochs * max(1, count // min(batch, max(1, count))) for count in images)


def startup_seconds(finished: Sequence[tuple[int, float]], seconds: float) -> float | None:
    """Seconds beyond the training steps, at the pace of the steps after the first; None: unknown.

    Below 0 where a training resumed from steps of another process.

    Args:
        finished: (finished steps, seconds at that time), of some steps in their order.
        seconds: of the whole work.

    >>> startup_seconds([(1, 61.0), (2, 62.0)], 64.0)
    62.0
    """
    if len(finished) < 2:
        return None
    (first, since), (last, until) = finished[0], finished[-1]
    return seconds - last * (until - since) / (last - first)


def estimate(work: Iterable[Work], store: ArtifactStore, resources: Resources) -> Estimate:
    """Estimate the seconds of work on one worker, and on all workers of this machine.

    Uses the measurements of this store and of its smoke store. The time on all workers is unknown
    if RAY_ADDRESS is set.
    """
    smoke = Path(smoke_store(store.root)) / HISTORY
    of_smoke: Measured = read_cache(smoke, _history, {})
    histories = (read_history(store), of_smoke)
    stages: dict[str, float] = {}
    sources: dict[str, str] = {}
    jobs: dict[str, float] = {}
    unmeasured: list[str] = []
    counts: list[int] = []  # of measurements
    slowest = 0.0
    for part in work:
        stage = part.stage
        found = _seconds_of(part, histories)
        if not found and part.alone:
            part = replace(part, kind=part.alone, starts=part.jobs)
            found = _seconds_of(part, histories)
        counts.append(len(found))
        if not found:
            unmeasured.append(f"{stage} ({part.kind})")
            has_guess = not {EMBEDDED["backbone"], "ready"}.isdisjoint(part.kind.split())
            found = [GUESS[stage].seconds_for(part)] if has_guess else []
            if sources.get(stage) != "unknown":
                sources[stage] = "guess" if has_guess else "unknown"
        if found:
            stages[stage] = stages.get(stage, 0.0) + min(found)
            jobs[stage] = jobs.get(stage, 0) + part.jobs
            slowest += max(found)
            sources.setdefault(stage, "history")
    machines = () if os.environ.get("RAY_ADDRESS") else (this_machine(),)
    gpu_seconds = (s * resources.process_resources(stage).gpu for stage, s in stages.items())
    start = Work(*START, 1.0)
    return Estimate(
        stages=stages,
        gpu_hours=sum(gpu_seconds) / 3600,
        reason=_reason(unmeasured, any_measured=any(histories)),
        sources=sources,
        work_wall=_wall(stages, jobs, resources, machines),
        start=min(_seconds_of(start, histories) or [GUESS["start"].seconds]) if counts else 0.0,
        measurements=min(counts, default=0),
        spread=slowest / sum(stages.values()) if any(stages.values()) else 1.0,
    )


def _seconds_of(work: Work, histories: Iterable[Measured]) -> list[float]:
    """The time of some work by each measurement of its kind."""
    return [
        pace.seconds_for(work)
        for history in histories
        for pace in history.get(work.stage, {}).get(work.kind, ())
        if pace.units or not work.units
    ]


def _reason(unmeasured: Sequence[str], any_measured: bool) -> str:
    if not unmeasured:
        return ""
    if not any_measured:
        return "this store has no measurements yet"
    names = list(dict.fromkeys(unmeasured))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"not measured in this store: {', '.join(names[:2])}{more}"


def _wall(
    stages: Mapping[str, float],
    jobs: Mapping[str, float],
    resources: Resources,
    machines: Sequence[Machine],
) -> float | None:
    """Seconds of stages that run one after another, each on as many workers as the machines
    hold; None: the machines are unknown."""
    total = 0.0
    for stage, seconds in stages.items():
        workers = process_capacity(resources.process_resources(stage), machines)
        if not workers:
            return None
        if stage in _DRAWN:
            workers = min(workers, resources.generator.actors or workers)
        total += seconds / min(workers, jobs[stage])
    return total


# ---------------------------------------------------------------- measurements


def read_history(store: ArtifactStore) -> Measured:
    """Read the measurements of a store."""
    return read_cache(store.refresh(store.root / HISTORY), _history, {})


def _history(plain: dict[str, Any]) -> Measured:
    """Measurements, without trials of which no start was measured."""
    return {
        stage: {
            kind: [Pace(**pace) for pace in paces if stage != "trials" or pace.get("starts")]
            for kind, paces in kinds.items()
        }
        for stage, kinds in plain.items()
    }


def record_measurements(store: ArtifactStore, measured: Mapping[tuple[str, str], Pace]) -> None:
    """Add the measurements of a run, by stage and kind, to the history of a store."""
    if not measured:
        return
    history = {stage: dict(kinds) for stage, kinds in read_history(store).items()}
    for (stage, kind), pace in measured.items():
        kinds = history.setdefault(stage, {})
        kinds[kind] = [*kinds.get(kind, ()), pace][-MOST:]
    plain = {
        stage: {kind: [*map(asdict, paces)] for kind, paces in kinds.items()}
        for stage, kinds in history.items()
    }
    store.write(store.root / HISTORY, sealed_json(plain))
