"""Checkpoints of trials that stopped between two iterations. Imports no torch.

A checkpoint is one safetensors file below `unfinished/`. It contains the state from which the next
iteration starts, the curves so far, and the objectives at each rung. Its key contains the code
version, so edited code starts the trial again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from air_core.seal import BLANK, intact, sealed
from air_core.specs import TrialSpec
from air_core.specs.normal import normalised
from orchestrator.store.artifacts import ArtifactStore

log = logging.getLogger(__name__)

ABOUT = "about"  # metadata key of the checkpoint's other fields
Rungs = Mapping[int, Mapping[str, float]]  # objectives by number of iterations
Curves = Mapping[str, Sequence[float]]  # by metric, one value per finished round


@dataclass(frozen=True)
class Segments:
    """The rungs of a trial in a search with pruning, and the iteration at which it stops now."""

    rungs: tuple[int, ...] = ()  # iterations after which its objectives are recorded
    stop_after: int | None = None  # iterations; None: the trial runs to its end


WHOLE_TRIAL = Segments()


@dataclass(frozen=True)
class Checkpoint:
    """State of a trial after some iterations."""

    iterations: int
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    curves: Mapping[str, list[float]] = field(default_factory=dict)  # one value per iteration
    rungs: Rungs = field(default_factory=dict)
    seconds: float = 0.0  # spent so far
    replicas: int = 1  # largest number of trials that were trained side by side


START = Checkpoint(0)


def training_spec(spec: TrialSpec) -> TrialSpec:
    """The trial whose training a trial uses: the same spec without another test dataset."""
    return normalised(replace(spec, test_dataset=None))


def read_checkpoint(spec: TrialSpec, store: ArtifactStore) -> Checkpoint:
    """The checkpoint of a trial; `START` if it has none."""
    file = _checkpoint_file(spec, store)
    if file is None:
        return START
    with safe_open(file, framework="np") as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return replace(_read_fields(file), arrays=arrays)


def write_checkpoint(spec: TrialSpec, store: ArtifactStore, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of a trial to the store."""
    about = asdict(replace(checkpoint, arrays={}))
    content = sealed(
        save(dict(checkpoint.arrays), metadata={ABOUT: json.dumps(about), "seal": BLANK})
    )
    store.write(store.checkpoint_path(training_spec(spec)), content)


def delete_checkpoint(spec: TrialSpec, store: ArtifactStore) -> None:
    """Remove the checkpoint of a trial, which is complete."""
    file = store.checkpoint_path(training_spec(spec))
    if file.exists():
        store.backend.remove(file)


def recorded_rungs(spec: TrialSpec, store: ArtifactStore) -> tuple[Rungs, float]:
    """Objectives of a trial at the rungs that it has reached, and the seconds spent on it.

    A trial that another sweep ran without rungs has none.
    """
    spec = training_spec(spec)
    rungs: dict[int, Mapping[str, float]] = {}
    seconds = 0.0
    file = _checkpoint_file(spec, store)
    if file is not None:
        checkpoint = _read_fields(file)
        rungs |= checkpoint.rungs
        seconds = checkpoint.seconds
    if store.has(spec):
        record = store.record(spec)
        rungs |= _parse_rungs(record["info"].get("rungs", {}))
        seconds = record["seconds"]
    return rungs, seconds


def is_finished(spec: TrialSpec, store: ArtifactStore, stop_after: int | None = None) -> bool:
    """Whether a trial has its record or, given `stop_after`, its objectives at that rung."""
    return store.has(spec) if stop_after is None else stop_after in recorded_rungs(spec, store)[0]


def _checkpoint_file(spec: TrialSpec, store: ArtifactStore) -> Path | None:
    """The current checkpoint file of a trial; None: missing or damaged."""
    file = store.refresh(store.checkpoint_path(training_spec(spec)))
    try:
        if intact(file.read_bytes()):
            return file
    except FileNotFoundError:
        return None
    log.warning("%s is damaged: the trial starts again from its first iteration", file)
    return None


def _read_fields(file: Path) -> Checkpoint:
    """A checkpoint without its arrays."""
    with safe_open(file, framework="np") as opened:
        about: dict[str, Any] = json.loads(opened.metadata()[ABOUT])
    return Checkpoint(**{**about, "rungs": _parse_rungs(about["rungs"])})


def _parse_rungs(rungs: Mapping[str, Mapping[str, float]]) -> dict[int, Mapping[str, float]]:
    """Rungs from JSON, whose keys are strings."""
    return {int(rung): objectives for rung, objectives in rungs.items()}
