"""Images that a LoRA is trained on, with their labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from air_core.classifiers import text_classifier
from air_core.lora_labels import class_agreement, lora_images, pool_classifier
from air_core.specs import LabelsSpec
from orchestrator.stages import ignore
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.evidence import read_evidence
from orchestrator.stages.features import known_accuracy, read_target
from orchestrator.stages.images import lora_before, read_synthetic
from orchestrator.store import ArtifactStore
from orchestrator.store.artifacts import Artifact


def build(
    spec: LabelsSpec, worker: WorkerContext, report: Callable[[int, int], None] = ignore
) -> Artifact:
    """Select the images that a LoRA is trained on: pseudo-labelled and labelled ones."""

    def write(folder: Path) -> dict[str, Any]:
        target = read_target(spec.features, spec.split, worker.store)
        dataset, split = target.text, target.split
        backbone = worker.backbone(spec.features.backbone, spec.features.precision)
        text = text_classifier(backbone, dataset.classnames, dataset.template)
        pool = target.batch(split.pool)
        synthetic = errors = None
        if spec.images is not None and spec.source != "labelled":
            classes = None if split.unseen is None else split.unseen.tolist()
            count = spec.settings.images_per_class
            synthetic = read_synthetic(spec.images, count, worker.store, classes)
        if spec.evidence is not None:
            errors = read_evidence(spec.evidence, spec.settings.evidence_draws, None, worker.store)
        index, labels = lora_images(
            text,
            pool,
            target.labelled(split.labelled) if len(split.labelled) else None,
            split,
            spec.settings,
            spec.source,
            synthetic,
            spec.split.split_seed if spec.drawn else None,
            errors,
            target.labels[split.pool] if spec.settings.true_share is not None else None,
        )
        save_file({"index": index.numpy(), "labels": labels.numpy()}, folder / "labels.safetensors")
        # The record contains the accuracy; nothing else reads these true labels.
        info: dict[str, Any] = {"images": len(index)}
        if (right := known_accuracy(labels, target.labels[index])) is not None:
            info["accuracy"] = right
        if spec.images is not None:
            info["kept"] = _share_kept(index.numpy(), labels.numpy(), spec, worker.store)
        if errors is None:
            return info
        classifier = pool_classifier(text, pool, split.unseen, synthetic, errors)
        agreement = class_agreement(classifier, pool).tolist()
        positions = range(len(agreement)) if split.unseen is None else split.unseen.tolist()
        names = [dataset.classnames[c] for c in positions]
        shares = {n: round(share, 3) for n, share in zip(names, agreement, strict=True)}
        return info | {"agreement": shares}

    return worker.store.get_or_build(spec, write)


def _share_kept(
    index: np.ndarray, labels: np.ndarray, spec: LabelsSpec, store: ArtifactStore
) -> float:
    """Share of the images of both rounds that have the same label in both."""
    before = load_file(store.get(lora_before(spec).labels).path / "labels.safetensors")
    now = set(zip(index.tolist(), labels.tolist(), strict=True))
    earlier = zip(before["index"].tolist(), before["labels"].tolist(), strict=True)
    return len(now.intersection(earlier)) / max(len(now), len(before["index"]))
