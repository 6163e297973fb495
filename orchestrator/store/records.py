"""The record of a finished trial. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from air_core.specs import TrialSpec
from orchestrator.store.artifacts import Artifact, ArtifactStore

PREDICTIONS, PROMPT = "predictions.safetensors", "prompt.safetensors"


# What a record says of its making; `code` and `dirty` are digests, `files` has one for each file.
MADE = ("user", "commit", "dirty", "code", "host", "versions", "files")


@dataclass(frozen=True)
class TrialRecord:
    """What a done trial left behind."""

    key: str
    metrics: dict[str, float]
    curves: dict[str, list[float]]  # one value per iteration
    objectives: dict[str, float]
    per_class: list[float]
    started: float  # seconds since the epoch
    seconds: float
    path: Path
    made: Mapping[str, Any] = field(default_factory=dict)  # by whom, with which code, on what

    @property
    def headline(self) -> float:
        """The test metric that the paradigm is judged by."""
        return self.metrics.get("test/harmonic_mean", self.metrics["test/accuracy"])

    def predictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the test images: position in the dataset, predicted class, true class; each (T,)."""
        arrays = load_file(self.path / PREDICTIONS)
        return arrays["index"], arrays["predictions"], arrays["labels"]

    def prompt(self) -> np.ndarray:
        """The learned vectors.

        Raises:
            ValueError: nothing was learned, or the trial ran before prompts were kept.
        """
        file = self.path / PROMPT
        if not file.exists():
            raise ValueError(f"{file} is not there; remove {self.path} to learn it again")
        return load_file(file)["prompt"]


def read_trial(spec: TrialSpec, store: ArtifactStore) -> TrialRecord:
    """A done trial. Imports no torch.

    Raises:
        MissingArtifact: it was not run yet.
    """
    return _record(store.get(spec))


def _record(artifact: Artifact) -> TrialRecord:
    info = artifact.record["info"]
    return TrialRecord(
        key=artifact.key.digest,
        metrics=info["metrics"],
        curves=info["curves"],
        objectives=info["objectives"],
        per_class=[math.nan if recall is None else recall for recall in info["per_class"]],
        started=artifact.record["started"],
        seconds=artifact.record["seconds"],
        path=artifact.path,
        made={
            **{name: artifact.record[name] for name in MADE if name in artifact.record},
            "device": info.get("device", ""),
        },
    )
