"""Checkpoints of running trials and LoRAs, which continue from them after a kill. Imports no torch.

A checkpoint is one safetensors file below `unfinished/`. It contains the state from which the next
round or step starts and the curves so far. Its key contains the code version, so edited code starts
the work again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from air_core.tools.seal import BLANK, intact, sealed
from orchestrator.keys import StageSpec, artifact_key
from orchestrator.store.artifacts import ArtifactStore

log = logging.getLogger(__name__)

ABOUT = "about"  # metadata key of the checkpoint's other fields
Curves = Mapping[str, Sequence[float]]  # by metric, one value per finished round or step


@dataclass(frozen=True)
class Checkpoint:
    """State of a trial between two rounds, or of a LoRA between two steps."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    seconds: float = 0.0  # spent so far


START = Checkpoint()


def read_checkpoint(spec: StageSpec, store: ArtifactStore) -> Checkpoint:
    """The checkpoint of a trial or LoRA; `START` if it has none, or a damaged one."""
    file = store.storage.local(store.checkpoint_path(spec), fresh=True)
    if not file.exists():
        return START
    if intact(file.read_bytes()):
        with safe_open(file, framework="np") as opened:
            about: dict[str, Any] = json.loads(opened.metadata()[ABOUT])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about.pop("digest") == artifact_key(spec).digest:
            return Checkpoint(arrays, **about)
    log.warning("%s is damaged: its work starts from the beginning", file)
    return START


def write_checkpoint(spec: StageSpec, store: ArtifactStore, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to the store, over an earlier one."""
    about = asdict(replace(checkpoint, arrays={})) | {"digest": artifact_key(spec).digest}
    del about["arrays"]
    content = save(dict(checkpoint.arrays), metadata={ABOUT: json.dumps(about), "seal": BLANK})
    store.storage.put(store.checkpoint_path(spec), sealed(content))


def delete_checkpoint(spec: StageSpec, store: ArtifactStore) -> None:
    """Remove the checkpoint of complete work."""
    file = store.checkpoint_path(spec)
    if file.exists():
        store.storage.delete(file)
