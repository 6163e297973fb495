"""How long what is left would take, from what runs have measured of the same kind of work.

`history.json`: seconds and units by stage and kind, of all that runs have made. A unit is a
training step of a LoRA, an image, a trial, a dataset through CLIP; a kind is what its cost depends
on: model, size, dataset, method. Seconds of starting, such as loading a model, are kept apart: two
steps of a smoke run say what a step takes, not that each loads the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from air_core.seal import sealed_json
from air_core.specs import (
    FeaturesSpec,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    SyntheticFeaturesSpec,
    TrialSpec,
    trains_on_synthetic,
    uses_auxiliary,
)
from orchestrator.planning.resources import Machine, room, this_machine
from orchestrator.spec import Resources
from orchestrator.store import ArtifactStore, smoke_store
from orchestrator.store.verification import read_cache

HISTORY = "history.json"
# Seconds of one unit where nothing of a stage was measured: the tiny world on one core.
GUESS = {"features": 8.0, "labels": 1.0, "lora": 0.15, "images": 0.03, "trials": 4.0}


@dataclass(frozen=True)
class Work:
    """Some units of one kind.

    Args:
        jobs: parts that may run side by side.
    """

    stage: str
    kind: str
    units: float
    jobs: float = 1


@dataclass(frozen=True)
class Pace:
    """What runs have measured of one kind of work."""

    seconds: float  # of all units together, without starting
    units: float
    startup: float = 0.0  # seconds of all starts together
    starts: float = 0.0

    def __add__(self, more: Pace) -> Pace:
        return Pace(
            round(self.seconds + more.seconds, 3),
            self.units + more.units,
            round(self.startup + more.startup, 3),
            self.starts + more.starts,
        )

    def of(self, units: float) -> float:
        """Seconds of so many units, started once."""
        started = self.startup / self.starts if self.starts else 0.0
        return started + units * self.seconds / self.units


Measured = Mapping[str, Mapping[str, Pace]]  # by stage and kind


@dataclass(frozen=True)
class Estimate:
    """Of all that is left."""

    stages: Mapping[str, float]  # seconds on one worker
    gpu_hours: float
    reason: str  # why it is not calibrated; empty: it is
    sources: Mapping[str, str]  # history or guess, by stage
    wall: float | None  # seconds at least, with all workers that fit; None: not known before

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    @property
    def calibrated(self) -> bool:
        return not self.reason

    @property
    def source(self) -> str:
        return _together(self.sources.values())

    def json(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1),
            "wall": None if self.wall is None else round(self.wall, 1),
            "calibrated": self.calibrated,
            "reason": self.reason,
            "source": self.source,
            "gpu_hours": round(self.gpu_hours, 3),
            "stages": {stage: round(seconds, 1) for stage, seconds in self.stages.items()},
            "sources": dict(self.sources),
        }


def stage_work(spec: Any, units: float = 1) -> Work:
    """The work of a stage, or of so many shards of a row."""
    stage, kind, each = _kind(spec)
    return Work(stage, kind, units * each, units)


def _kind(spec: Any) -> tuple[str, str, float]:
    """Stage, kind, and units in one of it."""
    match spec:
        case FeaturesSpec():
            return "features", f"{spec.dataset.name} {spec.backbone.name} {spec.level}", 1
        case LabelsSpec():
            return "labels", spec.features.backbone.name, 1
        case LoraSpec():
            kind = f"{spec.model.name} {spec.size}px batch {spec.training.batch}"
            return "lora", kind, spec.training.steps
        case SyntheticFeaturesSpec(images=GeneratedImages() as images):
            drawn = images.settings
            kind = f"{images.model.name} {drawn.size}px {drawn.num_inference_steps} steps"
            return "images", kind, images.block_size
        case SyntheticFeaturesSpec(images=images):
            return "images", "ready images", images.block_size
    raise TypeError(type(spec).__name__)


def trial_work(spec: TrialSpec, units: float = 1, together: int = 1) -> Work:
    """The work of some trials.

    Args:
        together: trials of one point, which run in one job.
    """
    rounds = f"{spec.iterations} rounds of {spec.train.steps or spec.train.epochs}"
    labels = spec.pseudo_labels.kind if spec.supervision == "pseudo" else spec.supervision
    words = [spec.dataset.name, spec.backbone.name, spec.modality, labels, rounds]
    words += ["with auxiliary"] if uses_auxiliary(spec) else []
    words += ["on synthetic images"] if trains_on_synthetic(spec) else []
    return Work("trials", " ".join(words), units, math.ceil(units / together))


def estimate(
    work: Iterable[Work],
    store: ArtifactStore,
    resources: Resources,
    machines: Sequence[Machine] | None = None,
) -> Estimate:
    """What it would take, one after the other, and at least on all machines.

    Args:
        machines: that it would run on; None: this one, or not known where a cluster is joined.
    """
    history = read_history(store)
    nothing: Measured = {}
    smoke = read_cache(Path(smoke_store(store.root)) / HISTORY, _smoke_history, nothing)
    found: dict[str, float] = {}
    sources: dict[str, list[str]] = {}
    jobs: dict[str, float] = {}
    unknown: list[str] = []
    for one in work:
        pace = history.get(one.stage, {}).get(one.kind) or smoke.get(one.stage, {}).get(one.kind)
        if pace is None:  # what other kinds take
            unknown.append(f"{one.stage} ({one.kind})")
            seconds = one.units * mean_seconds(history).get(one.stage, GUESS[one.stage])
        else:
            seconds = pace.of(one.units)
        found[one.stage] = found.get(one.stage, 0.0) + seconds
        jobs[one.stage] = jobs.get(one.stage, 0) + one.jobs
        sources.setdefault(one.stage, []).append("guess" if pace is None else "history")
    if machines is None:
        machines = () if os.environ.get("RAY_ADDRESS") else (this_machine(),)
    return Estimate(
        stages=found,
        gpu_hours=_gpu_hours(found, resources),
        reason=_reason(unknown, measured=bool(history or smoke)),
        sources={stage: _together(each) for stage, each in sources.items()},
        wall=_wall(found, jobs, resources, machines),
    )


def _together(sources: Iterable[str]) -> str:
    return "guess" if "guess" in sources else "history"


def _reason(unknown: Sequence[str], measured: bool) -> str:
    if not unknown:
        return ""
    if not measured:
        return "nothing was measured in this store yet: a guess from the tiny world on one core"
    names = list(dict.fromkeys(unknown))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"not measured in this store: {', '.join(names[:2])}{more}"


def gpu_share(stage: str, resources: Resources) -> float:
    """Devices that work of a stage asks for."""
    return resources.want(stage).gpu


def _gpu_hours(stages: Mapping[str, float], resources: Resources) -> float:
    return sum(seconds * gpu_share(stage, resources) for stage, seconds in stages.items()) / 3600


def _wall(
    stages: Mapping[str, float],
    jobs: Mapping[str, float],
    resources: Resources,
    machines: Sequence[Machine],
) -> float | None:
    """Stages one after the other, each on all workers that fit: nobody is faster than that."""
    total = 0.0
    for stage, seconds in stages.items():
        workers = room(resources.want(stage), machines)
        if not workers:
            return None
        if stage == "images":
            workers = min(workers, resources.generator.actors or workers)
        total += seconds / min(workers, jobs[stage])
    return total


# ---------------------------------------------------------------- what was measured


def read_history(store: ArtifactStore) -> Measured:
    return read_cache(store.refresh(store.root / HISTORY), _history, {})


def _history(kept: dict[str, Any]) -> Measured:
    return {
        stage: {kind: Pace(**of) for kind, of in kinds.items()}
        for stage, kinds in kept.items()
        if "seconds" not in kinds  # as it was kept before there were kinds
    }


def _smoke_history(kept: dict[str, Any]) -> Measured:
    """Without what earlier versions measured: loading was part of the pace of a few steps."""
    return {
        stage: {kind: Pace(**of) for kind, of in kinds.items() if "startup" in of}
        for stage, kinds in kept.items()
    }


def remember(store: ArtifactStore, done: Mapping[tuple[str, str], Pace]) -> None:
    """Add what was measured, by stage and kind."""
    if not done:
        return
    kept = {stage: dict(kinds) for stage, kinds in read_history(store).items()}
    for (stage, kind), pace in done.items():
        kinds = kept.setdefault(stage, {})
        kinds[kind] = kinds.get(kind, Pace(0.0, 0.0)) + pace
    plain = {
        stage: {kind: asdict(pace) for kind, pace in kinds.items()} for stage, kinds in kept.items()
    }
    store.write(store.root / HISTORY, sealed_json(plain))


def mean_seconds(history: Measured) -> dict[str, float]:
    """Of one unit of each stage, whatever its kind."""
    return {
        stage: sum(pace.seconds for pace in kinds.values())
        / sum(pace.units for pace in kinds.values())
        for stage, kinds in history.items()
    }
