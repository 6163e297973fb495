"""Estimates of the time that a sweep still needs, from measurements of earlier runs.

`history.json` in the store has seconds and units of all completed work, by stage and kind. A unit
is a training step of a LoRA, an image, a trial, or one pass of a dataset through CLIP. The kind
names everything that the cost of a unit depends on: model, size, dataset, method. Start-up time,
such as loading a model, is recorded separately, so that the few steps of a smoke run measure a step
without its start-up.
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
    EvidenceSpec,
    FeaturesSpec,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    SyntheticFeaturesSpec,
    TrialSpec,
    trains_on_synthetic,
    uses_auxiliary,
)
from orchestrator.planning.resources import Machine, process_capacity, this_machine
from orchestrator.spec import Resources
from orchestrator.store import ArtifactStore, smoke_store
from orchestrator.store.verification import read_cache

HISTORY = "history.json"
# Seconds of a unit of a stage without measurements: tiny models and digits on one CPU core.
GUESS = {
    "features": 8.0,
    "labels": 1.0,
    "lora": 0.15,
    "images": 0.03,
    "evidence": 0.004,
    "trials": 4.0,
}


@dataclass(frozen=True)
class Work:
    """A number of units of one kind.

    Args:
        jobs: parts that can run in parallel.
    """

    stage: str
    kind: str
    units: float
    jobs: float = 1


@dataclass(frozen=True)
class Pace:
    """Measured time of one kind of work."""

    seconds: float  # total of all units, without start-up
    units: float
    startup: float = 0.0  # total seconds of all starts
    starts: float = 0.0

    def __add__(self, more: Pace) -> Pace:
        return Pace(
            round(self.seconds + more.seconds, 3),
            self.units + more.units,
            round(self.startup + more.startup, 3),
            self.starts + more.starts,
        )

    def seconds_for(self, units: float) -> float:
        """Expected seconds of `units` units after one start."""
        startup = self.startup / self.starts if self.starts else 0.0
        return startup + units * self.seconds / self.units


Measured = Mapping[str, Mapping[str, Pace]]  # by stage and kind


@dataclass(frozen=True)
class Estimate:
    """Estimated time of all remaining work."""

    stages: Mapping[str, float]  # seconds on one worker
    gpu_hours: float
    reason: str  # why the estimate is not calibrated; empty if it is
    sources: Mapping[str, str]  # `history` or `guess`, by stage
    wall: float | None  # lower bound in seconds with all workers; None: the machines are unknown

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    @property
    def is_calibrated(self) -> bool:
        return not self.reason

    @property
    def source(self) -> str:
        return _combined_source(self.sources.values())

    def json(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1),
            "wall": None if self.wall is None else round(self.wall, 1),
            "calibrated": self.is_calibrated,
            "reason": self.reason,
            "source": self.source,
            "gpu_hours": round(self.gpu_hours, 3),
            "stages": {stage: round(seconds, 1) for stage, seconds in self.stages.items()},
            "sources": dict(self.sources),
        }


def stage_work(spec: Any, units: float = 1) -> Work:
    """The work of building an artifact.

    Args:
        units: shards to build, for a row of images; 1 for any other artifact.
    """
    stage, kind, per_shard = _kind(spec)
    return Work(stage, kind, units * per_shard, units)


def _kind(spec: Any) -> tuple[str, str, float]:
    """Stage, kind, and units of one artifact or shard."""
    match spec:
        case FeaturesSpec():
            return "features", f"{spec.dataset.name} {spec.backbone.name} {spec.level}", 1
        case LabelsSpec():
            return "labels", spec.features.backbone.name, 1
        case LoraSpec():
            kind = f"{spec.model.name} {spec.size}px batch {spec.training.batch}"
            return "lora", kind, spec.training.steps_on(_lora_images(spec.labels, spec.classes))
        case SyntheticFeaturesSpec(images=GeneratedImages() as images):
            drawn = images.settings
            kind = f"{images.model.name} {drawn.size}px {drawn.num_inference_steps} steps"
            return "images", kind, images.block_size
        case SyntheticFeaturesSpec(images=images):
            return "images", "ready images", images.block_size
        case EvidenceSpec():
            scoring = spec.scoring
            kind = f"{spec.model.name} {spec.size}px top {scoring.top or 'all'}"
            return "evidence", kind, spec.block_size
    raise TypeError(type(spec).__name__)


def _lora_images(labels: LabelsSpec, classes: int) -> int:
    """Images that a LoRA is trained on; a class may turn out to have fewer than `k`."""
    whole_pool = labels.split.pool_size if labels.settings.kind == "pool" else None
    return whole_pool or labels.settings.k * classes


def trial_work(spec: TrialSpec, units: float = 1, together: int = 1) -> Work:
    """The work of trials like `spec`.

    Args:
        units: number of trials.
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
    """Estimate the seconds of work on one worker, and a lower bound on all machines.

    Measurements of the smoke store are used where this store has none.

    Args:
        machines: the machines of the cluster; None: this machine, or unknown if RAY_ADDRESS is set.
    """
    history = read_history(store)
    empty: Measured = {}
    smoke = read_cache(Path(smoke_store(store.root)) / HISTORY, _smoke_history, empty)
    stages: dict[str, float] = {}
    sources: dict[str, list[str]] = {}
    jobs: dict[str, float] = {}
    unmeasured: list[str] = []
    for part in work:
        stage, kind = part.stage, part.kind
        pace = history.get(stage, {}).get(kind) or smoke.get(stage, {}).get(kind)
        if pace is None:  # use the mean over the other kinds of the stage
            unmeasured.append(f"{stage} ({kind})")
            seconds = part.units * mean_seconds(history).get(stage, GUESS[stage])
        else:
            seconds = pace.seconds_for(part.units)
        stages[stage] = stages.get(stage, 0.0) + seconds
        jobs[stage] = jobs.get(stage, 0) + part.jobs
        sources.setdefault(stage, []).append("guess" if pace is None else "history")
    if machines is None:
        machines = () if os.environ.get("RAY_ADDRESS") else (this_machine(),)
    return Estimate(
        stages=stages,
        gpu_hours=_gpu_hours(stages, resources),
        reason=_reason(unmeasured, any_measured=bool(history or smoke)),
        sources={stage: _combined_source(each) for stage, each in sources.items()},
        wall=_wall(stages, jobs, resources, machines),
    )


def _combined_source(sources: Iterable[str]) -> str:
    return "guess" if "guess" in sources else "history"


def _reason(unmeasured: Sequence[str], any_measured: bool) -> str:
    if not unmeasured:
        return ""
    if not any_measured:
        return "this store has no measurements yet: a guess from tiny models on one CPU core"
    names = list(dict.fromkeys(unmeasured))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"not measured in this store: {', '.join(names[:2])}{more}"


def gpu_share(stage: str, resources: Resources) -> float:
    """GPUs that one worker of a stage reserves, as a fraction or a count."""
    return resources.process_resources(stage).gpu


def _gpu_hours(stages: Mapping[str, float], resources: Resources) -> float:
    return sum(seconds * gpu_share(stage, resources) for stage, seconds in stages.items()) / 3600


def _wall(
    stages: Mapping[str, float],
    jobs: Mapping[str, float],
    resources: Resources,
    machines: Sequence[Machine],
) -> float | None:
    """Lower bound: stages run one after another, each on as many workers as the machines hold."""
    total = 0.0
    for stage, seconds in stages.items():
        workers = process_capacity(resources.process_resources(stage), machines)
        if not workers:
            return None
        if stage in ("images", "evidence"):
            workers = min(workers, resources.generator.actors or workers)
        total += seconds / min(workers, jobs[stage])
    return total


# ---------------------------------------------------------------- measurements


def read_history(store: ArtifactStore) -> Measured:
    """Read the measurements of a store."""
    return read_cache(store.refresh(store.root / HISTORY), _history, {})


def _history(plain: dict[str, Any]) -> Measured:
    return {
        stage: {kind: Pace(**pace) for kind, pace in kinds.items()}
        for stage, kinds in plain.items()
        if "seconds" not in kinds  # the format of a version without kinds
    }


def _smoke_history(plain: dict[str, Any]) -> Measured:
    """The same without entries of earlier versions, which included start-up in a few steps."""
    return {
        stage: {kind: Pace(**pace) for kind, pace in kinds.items() if "startup" in pace}
        for stage, kinds in plain.items()
    }


def record_measurements(store: ArtifactStore, measured: Mapping[tuple[str, str], Pace]) -> None:
    """Add measurements, by stage and kind, to the history of a store."""
    if not measured:
        return
    history = {stage: dict(kinds) for stage, kinds in read_history(store).items()}
    for (stage, kind), pace in measured.items():
        kinds = history.setdefault(stage, {})
        kinds[kind] = kinds.get(kind, Pace(0.0, 0.0)) + pace
    plain = {
        stage: {kind: asdict(pace) for kind, pace in kinds.items()}
        for stage, kinds in history.items()
    }
    store.write(store.root / HISTORY, sealed_json(plain))


def mean_seconds(history: Measured) -> dict[str, float]:
    """Mean seconds of one unit of each stage over all kinds."""
    return {
        stage: sum(pace.seconds for pace in kinds.values())
        / sum(pace.units for pace in kinds.values())
        for stage, kinds in history.items()
    }
