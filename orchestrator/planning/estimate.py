"""Estimates of the time that a sweep still needs, from measurements of earlier runs.

`history.json` in the store has the pace of each kind of work: seconds of a unit and of a start. A
unit is a training step of a LoRA or a trial, an image, or one pass of a dataset through CLIP. The
kind names everything that the cost of a unit depends on: model, size, dataset, method. A start,
such as loading a model, is measured separately, so that the few steps of a smoke run measure a step
without its start-up.

The fastest measurement counts: other programs on a machine make work slower, never faster. Work
of the embedded models that was never measured has a guess, work of other models none, since their
sizes differ by factors of a thousand.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from air_core.methods import EMBEDDED
from air_core.settings.conditions import trains_on_real, trains_on_synthetic, uses_auxiliary
from air_core.tools.seal import sealed_json
from orchestrator.keys import StageSpec
from orchestrator.planning.resources import process_capacity, this_machine
from orchestrator.spec import Resources
from orchestrator.stages import STAGES, TrialSpec
from orchestrator.stages.trial import side_by_side
from orchestrator.store import ArtifactStore, smoke_store
from orchestrator.store.verification import read_cache

HISTORY = "history.json"
SOURCES = ("history", "guess", "unknown")  # of the time of a stage, the best first


class Work(NamedTuple):
    """A number of units of one kind, in a number of jobs that can run in parallel."""

    stage: str
    kind: str
    units: float
    jobs: float = 1
    starts: float = 1

    @property
    def name(self) -> str:
        """Stage and kind, by which work is measured."""
        return f"{self.stage}: {self.kind}"


class Measured(NamedTuple):
    """Seconds of some work of one kind, with its units and starts."""

    seconds: float = 0.0  # without those of the starts
    units: float = 0.0
    startup: float = 0.0
    starts: float = 0.0

    def plus(self, more: Measured) -> Measured:
        return Measured(*map(sum, zip(self, more, strict=True)))

    @property
    def pace(self) -> list[float]:
        """Seconds of a unit and of a start."""
        return [
            round(self.seconds / (self.units or 1), 6),
            round(self.startup / (self.starts or 1), 3),
        ]


# Pace of the embedded models on one CPU core, until it is measured.
GUESS: dict[str, Sequence[float]] = {spec.stage: (spec.guess, 0.0) for spec in STAGES.values()}
GUESS["trials"] = (0.0025, 1.5)
# Until the first work of a run begins: Ray, then a process with its imports.
START = Work("start", "run", 1, starts=0)
GUESS["start"] = (15.0, 0.0)


@dataclass(frozen=True)
class Estimate:
    """Estimated time of all remaining work."""

    stages: Mapping[str, float]  # seconds on one worker; without those that have no estimate
    gpu_hours: float
    reason: str  # why the estimate is not calibrated; empty if it is
    sources: Mapping[str, str]  # one of SOURCES, by stage
    wall: float | None  # seconds of the run with all workers of this machine; None: unknown
    start: float  # seconds until the first work begins

    @property
    def is_known(self) -> bool:
        """Whether all work has a measurement or a guess."""
        return "unknown" not in self.sources.values()

    @property
    def seconds(self) -> float:
        return self.start + sum(self.stages.values())

    @property
    def work_seconds(self) -> float:
        """Seconds without the start. Infinite if none was measured on a GPU or of a large model."""
        is_vague = not self.is_known or (self.reason and self.gpu_hours)
        return math.inf if is_vague else sum(self.stages.values())

    def json(self) -> dict[str, Any]:
        known = self.is_known
        return {
            "seconds": round(self.seconds, 1) if known else None,
            "wall": round(self.wall, 1) if known and self.wall is not None else None,
            "calibrated": not self.reason,
            "reason": self.reason,
            "source": "guess" if self.reason else "history",
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
    """The work of trials like `spec`. A unit is a training step of one trial.

    Args:
        trials: number of trials.
        seeds: number of trials of a point, which run together where `side_by_side` says so.
        pool: number of pool images, of a trial that counts epochs; None: unknown.
    """
    labels = spec.pseudo_labels.kind if spec.supervision == "pseudo" else spec.supervision
    # A transfer trial trains nothing itself.
    rounds = 0 if spec.test_dataset is not None else spec.iterations
    words = [spec.dataset.name, spec.backbone.name, spec.modality, labels]
    words += [] if rounds else ["untrained"]
    words += ["with auxiliary"] if uses_auxiliary(spec) else []
    words += ["on synthetic images"] if trains_on_synthetic(spec) else []
    together = len(side_by_side([replace(spec, seed=seed) for seed in range(seeds)], "cpu")[0])
    units = trials * rounds * _steps(spec, pool or 0)
    return Work("trials", " ".join(words), units, math.ceil(trials / together), trials)


def _steps(spec: TrialSpec, pool: int) -> float:
    """Training steps of a mean round. An epoch has those of all images that may be selected: of
    labels above a threshold, and of labels that are not counted, the whole pool."""
    if spec.train.steps:
        return spec.train.steps
    classes, batch, images = len(spec.classnames), spec.train.batch, float(pool)
    if spec.supervision == "labelled":
        images = spec.shots * classes if spec.paradigm == "ssl" else images
    elif not trains_on_real(spec):
        images, batch = spec.images_per_class * classes, spec.train.synthetic_batch
    elif spec.pseudo_labels.growth == "fixed":
        images = spec.pseudo_labels.k * classes
    elif spec.pseudo_labels.growth == "growing":
        images *= (spec.iterations + 1) / spec.iterations / 2
    return spec.train.epochs * max(1.0, images / batch)


def estimate(work: Iterable[Work], store: ArtifactStore, resources: Resources) -> Estimate:
    """Estimate the seconds of work on one worker, and on all workers of this machine.

    Uses the measurements of this store and of its smoke store. The time on all workers is unknown
    if RAY_ADDRESS is set.
    """
    work = list(work)
    smoke: Paces = read_cache(Path(smoke_store(store.root)) / HISTORY, dict, {})
    paces = _fastest(read_paces(store), smoke)
    stages: dict[str, float] = defaultdict(float)
    jobs: dict[str, float] = defaultdict(float)
    sources: dict[str, str] = {}
    unmeasured = []
    for part in work:
        pace, source = paces.get(part.name), "history"
        if pace is None:
            unmeasured.append(f"{part.stage} ({part.kind})")
            words = part.kind.split()
            has_guess = not words or not {EMBEDDED["backbone"], "ready"}.isdisjoint(words)
            pace, source = (GUESS[part.stage], "guess") if has_guess else (None, "unknown")
        sources[part.stage] = max(source, sources.get(part.stage, source), key=SOURCES.index)
        if pace is not None:
            stages[part.stage] += part.units * pace[0] + part.starts * pace[1]
            jobs[part.stage] += part.jobs
    names = list(dict.fromkeys(unmeasured))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    reason = f"not measured in this store: {', '.join(names[:2])}{more}" if names else ""
    if names and not paces:
        reason = "this store has no measurements yet"
    start = paces.get(START.name, GUESS["start"])[0] if work else 0.0
    gpu_seconds = (
        s * resources.process_resources(STAGES[stage].process).gpu for stage, s in stages.items()
    )
    return Estimate(
        stages=stages,
        gpu_hours=sum(gpu_seconds) / 3600,
        reason=reason,
        sources=sources,
        wall=None if os.environ.get("RAY_ADDRESS") else _wall(start, stages, jobs, resources),
        start=start,
    )


def _wall(
    total: float, stages: Mapping[str, float], jobs: Mapping[str, float], resources: Resources
) -> float | None:
    """Seconds of a start, then of stages one after another, each on as many workers as this machine
    holds; None: it holds none."""
    for stage, seconds in stages.items():
        spec = STAGES[stage]
        workers = process_capacity(resources.process_resources(spec.process), [this_machine()])
        if not workers:
            return None
        if spec.shard and spec.process == "generator":  # a pool makes its shards
            workers = min(workers, resources.generator.actors or workers)
        total += seconds / min(workers, jobs[stage])
    return total


# ---------------------------------------------------------------- measurements

Paces = Mapping[str, Sequence[float]]  # seconds of a unit and of a start, by stage and kind


def _fastest(*histories: Paces) -> Paces:
    names = dict.fromkeys(name for history in histories for name in history)
    return {
        name: [*map(min, zip(*(each[name] for each in histories if name in each), strict=True))]
        for name in names
    }


def read_paces(store: ArtifactStore) -> Paces:
    """Read the paces of a store."""
    return read_cache(store.storage.local(store.root / HISTORY, fresh=True), dict, {})


def record_measurements(store: ArtifactStore, measured: Mapping[str, Measured]) -> None:
    """Compare the measurements of a run, by stage and kind, with the history of a store."""
    if measured:
        paces = {name: each.pace for name, each in measured.items()}
        store.storage.put(store.root / HISTORY, sealed_json(_fastest(read_paces(store), paces)))
