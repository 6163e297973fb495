"""The record of a finished trial. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from air_core.bundle.checks import CLASSIFIERS
from orchestrator.keys import Keyed
from orchestrator.store.artifacts import ArtifactStore

PREDICTIONS, PROMPT = "predictions.safetensors", "prompt.safetensors"
FUSED, POOL = "fused.safetensors", "pool.safetensors"
# Fields of a record on its origin; `code` is a digest, `files` has one digest per file.
PROVENANCE = ("user", "commit", "code", "host", "versions", "files")


@dataclass(frozen=True)
class TrialRecord:
    """Results and provenance of a complete trial."""

    key: str
    metrics: dict[str, float]
    curves: dict[str, list[float]]  # one value per iteration
    objectives: dict[str, float]
    per_class: list[float]
    started: float  # seconds since the epoch
    seconds: float
    path: Path
    spec: Mapping[str, Any]  # plain data of the normalised spec
    provenance: Mapping[str, Any] = field(default_factory=dict)  # PROVENANCE fields and `device`
    startup: float | None = None  # seconds that do not depend on the number of steps; None: unknown

    @property
    def headline(self) -> float | None:
        """Main test metric: the harmonic mean if the paradigm has one, else the accuracy.

        None: no image is labelled for test.
        """
        return self.metrics.get("test/harmonic_mean", self.metrics.get("test/accuracy"))

    def predictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dataset index, predicted class and true class of each test image; each (T,)."""
        arrays = self.test_arrays()
        return arrays["index"], arrays["predictions"], arrays["labels"]

    def test_arrays(self) -> dict[str, np.ndarray]:
        """`index`, `predictions` and `labels` of `predictions()`; for each classifier that the
        trial has, its predictions as `text`, `auxiliary` or `fused`, and the probabilities of these
        as `probability_text`, ...; each (T,).
        """
        return self._arrays(PREDICTIONS)

    def pool_arrays(self) -> dict[str, np.ndarray]:
        """`index`, `predictions` of pool images after the last round, with denoising errors where
        the trial reads them; predictions and probabilities of each classifier as in `test_arrays`;
        each (P,). Empty: the trial tests the prompt of another one.
        """
        return self._arrays(POOL)

    def fused_arrays(self) -> dict[str, np.ndarray]:
        """Arrays of the fused classifier, see `air_core.bundle.arrays`; empty: it has none."""
        return self._arrays(FUSED)

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        try:
            return load((self.path / name).read_bytes())
        except FileNotFoundError:
            return {}

    def default_classifier(self) -> str:
        """The classifier with the highest validation accuracy; without validation images, the fused
        one where there is one."""
        scores = {
            name: self.metrics[metric]
            for name in CLASSIFIERS
            if (metric := f"objective/validation_accuracy_{name}") in self.metrics
        }
        if scores:
            return max(scores, key=lambda name: scores[name])
        return "fused" if self.fused_arrays() else "text"

    def prompt(self) -> np.ndarray:
        """The prompt vectors of a method that learns some."""
        return self._arrays(PROMPT)["prompt"]


def read_trial(spec: Keyed, store: ArtifactStore) -> TrialRecord:
    """Read the record of a complete trial. Imports no torch.

    Raises:
        MissingArtifact: the trial has not been run.
    """
    artifact = store.get(spec)
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
        spec=artifact.record["spec"],
        provenance={
            **{name: artifact.record[name] for name in PROVENANCE if name in artifact.record},
            "device": info.get("device", ""),
        },
        startup=info.get("startup"),
    )
