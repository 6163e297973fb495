"""One trial: gather its inputs from the store, call the method, record what came out.

A trial only reads; what it lacks is an error that says what to run. The true labels of the pool
are looked at here, beside the method, to tell how good pseudo-labels were.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from air_core.specs import TrialSpec
from orchestrator.store import Artifact, ArtifactStore

if TYPE_CHECKING:
    from torch import Tensor

    from air_core.types import Labelled, Metrics


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

    @property
    def headline(self) -> float:
        """The test metric that the paradigm is judged by."""
        return self.metrics.get("test/harmonic_mean", self.metrics["test/accuracy"])

    def predictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the test images: position in the dataset, predicted class, true class; each (T,)."""
        arrays = load_file(self.path / "predictions.safetensors")
        return arrays["index"], arrays["predictions"], arrays["labels"]


def read_trial(spec: TrialSpec, store: ArtifactStore) -> TrialRecord:
    """A done trial. Imports no torch.

    Raises:
        MissingArtifact: it was not run yet.
    """
    return _record(store.get(spec))


def run_trial(spec: TrialSpec, store: ArtifactStore, device: str = "cpu") -> TrialRecord:
    """The trial's record; run first where it is missing.

    Raises:
        MissingArtifact: an input was not prepared.
    """
    spec = spec.normalised()
    return _record(store.get_or_build(spec, lambda folder: _run(spec, store, device, folder)))


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
    )


def _run(spec: TrialSpec, store: ArtifactStore, device: str, folder: Path) -> dict[str, Any]:
    # torch and CLIP are needed here only: reading a record must not cost their import.
    import torch

    from air_core.datasets import get_dataset
    from air_core.evaluation import measured
    from air_core.method import Progress, TrialData, learn
    from orchestrator.stages import read_target
    from orchestrator.workshop import Workshop

    # On one thread a CPU trial can be repeated bit for bit.
    torch.set_num_threads(1)
    started = time.monotonic()
    reader = store.read_only()
    target = read_target(spec.features, spec.split, reader, spec.tokens)
    split = target.split
    dataset = get_dataset(spec.dataset.name)
    row = spec.synthetic_features
    data = TrialData(
        backbone=Workshop(reader, device=device).backbone(spec.backbone),
        classnames=dataset.classnames,
        template=dataset.template,
        pool=target.batch(split.pool),
        labelled=target.labelled(split.labelled) if len(split.labelled) else None,
        unseen=split.unseen,
        validation=target.labelled(split.validation) if len(split.validation) else None,
        test=target.labelled(split.test),
        synthetic=_synthetic(spec, split.unseen, reader) if row else None,
    )
    truth = target.labels[split.pool]
    curves: dict[str, list[float]] = {}

    def watch(progress: Progress) -> None:
        values = {"train/loss": progress.loss}
        if spec.modality == "text":  # a pass of the vision tower over all test images is too dear
            with torch.no_grad():
                guess = progress.learned.logits(data.test.batch).argmax(dim=-1)
            tested = measured(guess, data.test.labels, len(data.classnames), data.unseen)
            values |= _headlines(tested)
        chosen = progress.labels
        if chosen is not None:
            right = (truth[chosen.indices] == chosen.labels).double().mean().item()
            values |= {"pseudo/accuracy": right, "pseudo/coverage": len(chosen) / len(truth)}
        for name, value in values.items():
            curves.setdefault(name, []).append(value)

    result = learn(spec, data, watch)
    save_file(
        {
            "index": split.test.numpy(),
            "predictions": result.test.predictions.cpu().numpy().astype(np.int32),
            "labels": data.test.labels.numpy().astype(np.int32),
        },
        folder / "predictions.safetensors",
    )
    metrics = {name: values[-1] for name, values in curves.items()}
    believed = (result.pool_predictions.cpu() == truth).double().mean().item()
    if not curves:  # nothing was learned: every pool image keeps the label that it got at first
        metrics |= {"pseudo/accuracy": believed, "pseudo/coverage": 1.0}
    metrics["pool/accuracy_fused"] = believed
    metrics |= _headlines(result.test)
    metrics |= {f"test/accuracy_{name}": share for name, share in result.inference.items()}
    metrics |= {f"objective/{name}": value for name, value in result.objectives.items()}
    if data.synthetic is not None:
        metrics["synthetic/images"] = float(len(data.synthetic))
    metrics["time/train_s"] = round(time.monotonic() - started, 3)
    return {
        "metrics": metrics,
        "curves": curves,
        "objectives": result.objectives,
        "per_class": [None if math.isnan(recall) else recall for recall in result.test.per_class],
    }


def _headlines(tested: Metrics) -> dict[str, float]:
    named = {
        "test/accuracy": tested.accuracy,
        "test/seen": tested.seen,
        "test/unseen": tested.unseen,
        "test/harmonic_mean": tested.harmonic_mean,
    }
    return {name: value for name, value in named.items() if value is not None}


def _synthetic(spec: TrialSpec, unseen: Tensor | None, reader: ArtifactStore) -> Labelled:
    """The images that the trial reads: in TRZSL of unseen classes alone."""
    from orchestrator.image_rows import read_synthetic

    classes = None if unseen is None else unseen.tolist()
    row, tokens = spec.synthetic_features, spec.synthetic_tokens
    assert row is not None
    return read_synthetic(row, spec.images_per_class, reader, classes, tokens)
