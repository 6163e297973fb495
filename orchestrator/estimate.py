"""How long what is left would take, from what the store has measured of the same kind of work.

`history.json`: seconds and units by stage and kind. A unit is a training step of a LoRA, an image,
a trial, a dataset through CLIP; a kind is what its cost depends on: model, size, dataset, method.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from air_core.specs import (
    FeaturesSpec,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    SyntheticFeaturesSpec,
    TrialSpec,
)
from orchestrator.store import write_whole
from orchestrator.sweep import Resources

# Seconds of one unit where nothing of a stage was measured: the tiny world on one core.
GUESS = {"features": 8.0, "labels": 1.0, "lora": 0.15, "images": 0.03, "trials": 4.0}

Measured = Mapping[str, Mapping[str, tuple[float, float]]]  # seconds, units by stage and kind


@dataclass(frozen=True)
class Work:
    """Some units of one kind."""

    stage: str
    kind: str
    units: float


@dataclass(frozen=True)
class Estimate:
    """Of all that is left."""

    stages: Mapping[str, float]  # seconds on one worker
    gpu_hours: float
    reason: str  # why it is not calibrated; empty: it is

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    @property
    def calibrated(self) -> bool:
        return not self.reason

    def json(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1),
            "calibrated": self.calibrated,
            "reason": self.reason,
            "gpu_hours": round(self.gpu_hours, 3),
            "stages": {stage: round(seconds, 1) for stage, seconds in self.stages.items()},
        }


def stage_work(spec: Any, units: float = 1) -> Work:
    """The work of a stage, or of so many shards of a row."""
    match spec:
        case FeaturesSpec():
            return Work("features", f"{spec.dataset.name} {spec.backbone.name} {spec.level}", units)
        case LabelsSpec():
            return Work("labels", spec.features.backbone.name, units)
        case LoraSpec():
            kind = f"{spec.model.name} {spec.size}px batch {spec.training.batch}"
            return Work("lora", kind, units * spec.training.steps)
        case SyntheticFeaturesSpec(images=GeneratedImages() as images):
            drawn = images.settings
            kind = f"{images.model.name} {drawn.size}px {drawn.num_inference_steps} steps"
            return Work("images", kind, units * images.block_size)
        case SyntheticFeaturesSpec(images=images):
            return Work("images", "ready images", units * images.block_size)
    raise TypeError(type(spec).__name__)


def trial_work(spec: TrialSpec, units: float = 1) -> Work:
    rounds = f"{spec.iterations} rounds of {spec.train.steps or spec.train.epochs}"
    labels = spec.pseudo_labels.kind if spec.supervision == "pseudo" else spec.supervision
    words = [spec.dataset.name, spec.backbone.name, spec.modality, labels, rounds]
    return Work("trials", " ".join(words), units)


def estimate(work: Iterable[Work], root: Path, resources: Resources) -> Estimate:
    """What it would take, one after the other."""
    history = read_history(root)
    found: dict[str, float] = {}
    unknown: list[Work] = []
    for one in work:
        seconds, measured = _seconds(one, history)
        unknown += [] if measured else [one]
        found[one.stage] = found.get(one.stage, 0.0) + seconds * one.units
    return Estimate(found, _gpu_hours(found, resources), _reason(unknown, history))


def _seconds(work: Work, history: Measured) -> tuple[float, bool]:
    """Of one unit, and whether its kind was measured; else the mean of other kinds, or a guess."""
    kinds = history.get(work.stage, {})
    if work.kind in kinds:
        seconds, units = kinds[work.kind]
        return seconds / units, True
    if kinds:
        seconds, units = (sum(column) for column in zip(*kinds.values(), strict=True))
        return seconds / units, False
    return GUESS[work.stage], False


def _reason(unknown: list[Work], history: Measured) -> str:
    if not unknown:
        return ""
    if not history:
        return "nothing was measured in this store yet: a guess from the tiny world on one core"
    names = list(dict.fromkeys(f"{work.stage} ({work.kind})" for work in unknown))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"not measured in this store: {', '.join(names[:2])}{more}"


def _gpu_hours(stages: Mapping[str, float], resources: Resources) -> float:
    share = {"trials": resources.trial.gpu}
    gpu = resources.generator.gpu
    return sum(seconds * share.get(stage, gpu) for stage, seconds in stages.items()) / 3600


# ---------------------------------------------------------------- what was measured


def read_history(root: Path) -> Measured:
    try:
        kept = json.loads((root / "history.json").read_text())
    except FileNotFoundError:
        return {}
    return {
        stage: {kind: (of["seconds"], of["units"]) for kind, of in kinds.items()}
        for stage, kinds in kept.items()
        if "seconds" not in kinds  # as it was kept before there were kinds
    }


def remember(root: Path, done: Mapping[tuple[str, str], tuple[float, float]]) -> None:
    """Add seconds and units by stage and kind."""
    if not done:
        return
    kept: dict[str, dict[str, dict[str, float]]] = {
        stage: {kind: {"seconds": s, "units": u} for kind, (s, u) in kinds.items()}
        for stage, kinds in read_history(root).items()
    }
    for (stage, kind), (seconds, units) in done.items():
        entry = kept.setdefault(stage, {}).setdefault(kind, {"seconds": 0.0, "units": 0.0})
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        entry["units"] += units
    write_whole(root / "history.json", json.dumps(kept, indent=1, sort_keys=True))


def mean_seconds(history: Measured) -> dict[str, float]:
    """Of one unit of each stage, whatever its kind."""
    found = {}
    for stage, kinds in history.items():
        seconds, units = (sum(column) for column in zip(*kinds.values(), strict=True))
        found[stage] = seconds / units
    return found
