"""Trials that stopped between two iterations: kept in the store, to go on or to be judged.

A checkpoint is one safetensors file below `unfinished/`, written whole, of the code that is here:
another code begins again. It holds what the next iteration begins with, what was measured so far,
and the objectives at each rung. Imports no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from air_core.normal import normalised
from air_core.seal import BLANK, intact, sealed
from air_core.specs import TrialSpec
from orchestrator.store.artifacts import ArtifactStore

log = logging.getLogger(__name__)

ABOUT = "about"  # key of a file's metadata
Rungs = Mapping[int, Mapping[str, float]]  # objectives after so many iterations


@dataclass(frozen=True)
class Checkpoint:
    """A trial after some iterations."""

    iterations: int
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    curves: Mapping[str, list[float]] = field(default_factory=dict)  # one value per iteration
    rungs: Rungs = field(default_factory=dict)
    seconds: float = 0.0  # that were paid for it
    replicas: int = 1  # the most that were trained side by side


START = Checkpoint(0)


def learned_by(spec: TrialSpec) -> TrialSpec:
    """The trial that learns what a trial tests: itself, unless it is tested elsewhere."""
    return normalised(replace(spec, test_dataset=None))


def read_checkpoint(spec: TrialSpec, store: ArtifactStore) -> Checkpoint:
    """Where a trial stands; `START` where nothing was kept."""
    file = _brought(spec, store)
    if file is None:
        return START
    with safe_open(file, framework="np") as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return replace(_about(file), arrays=arrays)


def keep_checkpoint(spec: TrialSpec, store: ArtifactStore, kept: Checkpoint) -> None:
    about = asdict(replace(kept, arrays={}))
    content = sealed(save(dict(kept.arrays), metadata={ABOUT: json.dumps(about), "seal": BLANK}))
    store.write(store.unfinished(learned_by(spec)), content)


def drop_checkpoint(spec: TrialSpec, store: ArtifactStore) -> None:
    """The trial has its record, and what was kept of it is no longer needed."""
    file = store.unfinished(learned_by(spec))
    if file.exists():
        store.backend.remove(file)


def rungs_of(spec: TrialSpec, store: ArtifactStore) -> tuple[Rungs, float]:
    """The objectives of a trial at the rungs that it has passed, and the seconds it has taken.

    Another sweep may have run it without any rung; it has none then, record or not.
    """
    spec = learned_by(spec)
    found: dict[int, Mapping[str, float]] = {}
    seconds = 0.0
    file = _brought(spec, store)
    if file is not None:
        kept = _about(file)
        found |= kept.rungs
        seconds = kept.seconds
    if store.has(spec):
        record = store.record(spec)
        found |= numbered(record["info"].get("rungs", {}))
        seconds = record["seconds"]
    return found, seconds


def _brought(spec: TrialSpec, store: ArtifactStore) -> Path | None:
    """The checkpoint of a trial; None where there is none, or a damaged one."""
    file = store.refresh(store.unfinished(learned_by(spec)))
    try:
        if intact(file.read_bytes()) is not False:
            return file
    except FileNotFoundError:
        return None
    log.warning("%s is damaged: the trial is run from its start", file)
    return None


def numbered(rungs: Mapping[str, Mapping[str, float]]) -> dict[int, Mapping[str, float]]:
    """Rungs as JSON has them."""
    return {int(rung): objectives for rung, objectives in rungs.items()}


def _about(file: Path) -> Checkpoint:
    with safe_open(file, framework="np") as opened:
        about: dict[str, Any] = json.loads(opened.metadata()[ABOUT])
    return Checkpoint(**{**about, "rungs": numbered(about["rungs"])})
