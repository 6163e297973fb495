"""How long what is left would take, from what the store has measured of the same kind of work.

`history.json`: seconds and units by stage and kind, of all that runs have made. A unit is a
training step of a LoRA, an image, a trial, a dataset through CLIP; a kind is what its cost depends
on: model, size, dataset, method. `probed.json`: what a probe (orchestrator.probe) has measured of
kinds that have no history.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from orchestrator.fit import Machine, room, this_machine
from orchestrator.store import ArtifactStore
from orchestrator.sweep import Resources
from orchestrator.verification import read_cache

# Seconds of one unit where nothing of a stage was measured: the tiny world on one core.
GUESS = {"features": 8.0, "labels": 1.0, "lora": 0.15, "images": 0.03, "trials": 4.0}

CPU = "CPU"  # the device of a probe that ran on no GPU

Measured = Mapping[str, Mapping[str, tuple[float, float]]]  # seconds, units by stage and kind


@dataclass(frozen=True)
class Work:
    """Some units of one kind.

    Args:
        jobs: parts that may run side by side.
        examples: a spec of this kind; of trials those of one point, which run together.
    """

    stage: str
    kind: str
    units: float
    jobs: float = 1
    examples: tuple[Any, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Pace:
    """What a probe has found of one kind of work."""

    seconds: float  # of a unit
    once: float  # more seconds each time that it starts: loading
    device: str


@dataclass(frozen=True)
class Probed:
    """What probes have found, by stage and kind, and why there is nothing of some kinds."""

    paces: Mapping[tuple[str, str], Pace]
    problems: Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class Estimate:
    """Of all that is left."""

    stages: Mapping[str, float]  # seconds on one worker
    gpu_hours: float
    reason: str  # why it is not calibrated; empty: it is
    sources: Mapping[str, str]  # what the seconds of each stage are known from
    devices: tuple[str, ...]  # that probes ran on
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
            "probed_on": list(self.devices),
        }


def stage_work(spec: Any, units: float = 1) -> Work:
    """The work of a stage, or of so many shards of a row."""
    stage, kind, each = _kind(spec)
    return Work(stage, kind, units * each, units, (spec,))


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


def trial_work(spec: TrialSpec, units: float = 1, together: Sequence[TrialSpec] = ()) -> Work:
    """The work of some trials.

    Args:
        together: those of one point, this one among them.
    """
    rounds = f"{spec.iterations} rounds of {spec.train.steps or spec.train.epochs}"
    labels = spec.pseudo_labels.kind if spec.supervision == "pseudo" else spec.supervision
    words = [spec.dataset.name, spec.backbone.name, spec.modality, labels, rounds]
    words += ["with auxiliary"] if uses_auxiliary(spec) else []
    words += ["on synthetic images"] if trains_on_synthetic(spec) else []
    examples = tuple(together) or (spec,)
    jobs = math.ceil(units / len(examples))
    return Work("trials", " ".join(words), units, jobs, examples)


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
    history, probed = read_history(store), read_probed(store)
    found: dict[str, float] = {}
    sources: dict[str, list[str]] = {}
    jobs: dict[str, float] = {}
    unknown: list[Work] = []
    paces: list[tuple[str, Pace]] = []
    for one in work:
        seconds, source = _seconds(one, history, probed.paces)
        if source == "guess":
            unknown.append(one)
        if source == "probe":
            paces.append((one.stage, probed.paces[one.stage, one.kind]))
        found[one.stage] = found.get(one.stage, 0.0) + seconds
        jobs[one.stage] = jobs.get(one.stage, 0) + one.jobs
        sources.setdefault(one.stage, []).append(source)
    if machines is None:
        machines = () if os.environ.get("RAY_ADDRESS") else (this_machine(),)
    return Estimate(
        stages=found,
        gpu_hours=_gpu_hours(found, resources),
        reason=_reason(unknown, history, probed) or _elsewhere(paces, resources),
        sources={stage: _together(each) for stage, each in sources.items()},
        devices=tuple(sorted({pace.device for _, pace in paces})),
        wall=_wall(found, jobs, resources, machines),
    )


def _seconds(
    work: Work, history: Measured, paces: Mapping[tuple[str, str], Pace]
) -> tuple[float, str]:
    """Of all its units, and what from; a guess is the mean of other kinds, or a number above."""
    kinds = history.get(work.stage, {})
    if work.kind in kinds:
        seconds, units = kinds[work.kind]
        return work.units * seconds / units, "history"
    if pace := paces.get((work.stage, work.kind)):
        return pace.once + work.units * pace.seconds, "probe"
    return work.units * mean_seconds(history).get(work.stage, GUESS[work.stage]), "guess"


def _together(sources: Iterable[str]) -> str:
    """
    >>> _together(["probe", "history"]), _together(["history", "guess"]), _together([])
    ('history and probe', 'guess', 'history')
    """
    found = set(sources)
    return "guess" if "guess" in found else " and ".join(sorted(found)) or "history"


def _reason(unknown: list[Work], history: Measured, probed: Probed) -> str:
    if not unknown:
        return ""
    if not history and not probed.paces and not probed.problems:
        return "nothing was measured in this store yet: a guess from the tiny world on one core"
    names = list(dict.fromkeys(_named(work, probed) for work in unknown))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"not measured in this store: {', '.join(names[:2])}{more}"


def _named(work: Work, probed: Probed) -> str:
    problem = probed.problems.get((work.stage, work.kind))
    return f"{work.stage} ({work.kind})" + (f", whose probe failed: {problem}" if problem else "")


def _elsewhere(paces: Iterable[tuple[str, Pace]], resources: Resources) -> str:
    """Work that asks for a GPU and was probed on none."""
    stages = [stage for stage, pace in paces if pace.device == CPU and gpu_share(stage, resources)]
    if not stages:
        return ""
    return (
        f"{', '.join(dict.fromkeys(stages))} ask for GPUs and were probed on a CPU, for want of "
        "a GPU: neither time nor GPU-hours are calibrated"
    )


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
    return read_cache(store.refresh(store.root / "history.json"), _history, {})


def _history(kept: dict[str, Any]) -> Measured:
    return {
        stage: {kind: (float(of["seconds"]), float(of["units"])) for kind, of in kinds.items()}
        for stage, kinds in kept.items()
        if "seconds" not in kinds  # as it was kept before there were kinds
    }


def remember(store: ArtifactStore, done: Mapping[tuple[str, str], tuple[float, float]]) -> None:
    """Add seconds and units by stage and kind."""
    if not done:
        return
    kept: dict[str, dict[str, dict[str, float]]] = {
        stage: {kind: {"seconds": s, "units": u} for kind, (s, u) in kinds.items()}
        for stage, kinds in read_history(store).items()
    }
    for (stage, kind), (seconds, units) in done.items():
        entry = kept.setdefault(stage, {}).setdefault(kind, {"seconds": 0.0, "units": 0.0})
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        entry["units"] += units
    store.write(store.root / "history.json", sealed_json(kept))


def mean_seconds(history: Measured) -> dict[str, float]:
    """Of one unit of each stage, whatever its kind."""
    found = {}
    for stage, kinds in history.items():
        seconds, units = (sum(column) for column in zip(*kinds.values(), strict=True))
        found[stage] = seconds / units
    return found


def read_probed(store: ArtifactStore) -> Probed:
    return read_cache(store.refresh(store.root / "probed.json"), _probed, Probed({}, {}))


def _probed(kept: dict[str, Any]) -> Probed:
    each = [((stage, kind), of) for stage, kinds in kept.items() for kind, of in kinds.items()]
    return Probed(
        {name: Pace(**of) for name, of in each if "problem" not in of},
        {name: of["problem"] for name, of in each if "problem" in of},
    )


def remember_probed(store: ArtifactStore, found: Mapping[tuple[str, str], Pace | str]) -> None:
    """Keep what a probe has found, or what it failed of; earlier probes of other kinds stay."""
    earlier = read_probed(store)
    every: dict[tuple[str, str], Pace | str] = {**earlier.problems, **earlier.paces}
    # What was measured once is not lost to a failure.
    every |= {
        name: of for name, of in found.items() if isinstance(of, Pace) or name not in earlier.paces
    }
    kept: dict[str, dict[str, Any]] = {}
    for (stage, kind), of in every.items():
        entry = {"problem": of} if isinstance(of, str) else asdict(of)
        kept.setdefault(stage, {})[kind] = entry
    store.write(store.root / "probed.json", sealed_json(kept))
