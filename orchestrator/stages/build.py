"""One function for each stage: builds an artifact from its spec and the artifacts that it nests.

This module does not depend on sweeps or clusters. Images are drawn in `image_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor

from air_core.classifiers import text_classifier
from air_core.datasets import Examples
from air_core.datasets.images import BAD_SHARE, Unreadable
from air_core.diffusion import text_of
from air_core.diffusion.lora import square, train_lora
from air_core.lora_labels import class_agreement, lora_images, pool_classifier
from air_core.paradigms import make_split
from air_core.specs import FeaturesSpec, LabelsSpec, LoraSpec, SplitSettings
from air_core.types import Batch, Labelled, Split
from orchestrator.planning.dataset_text import DatasetText, read_dataset_text
from orchestrator.planning.resolve import images_folder
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.image_rows import read_synthetic
from orchestrator.store import ArtifactStore
from orchestrator.store.artifacts import Artifact

PARTS = ("train", "val", "test", "free", "bad")
CHUNK = 512  # images that are decoded before they are encoded


# ---------------------------------------------------------------- features


def build_features(
    spec: FeaturesSpec, worker: WorkerContext, report: Callable[[int, int], None] | None = None
) -> Artifact:
    """Make the CLIP features, or patch tokens, of a whole dataset.

    An image that cannot be decoded is left out of every split.

    Args:
        report: called with the number of finished images and of all images.

    Raises:
        ValueError: too many images cannot be decoded.
    """

    def build(folder: Path) -> dict[str, Any]:
        with worker.unchanged_examples(spec.dataset) as examples:
            return encode(examples, folder)

    def encode(examples: Examples, folder: Path) -> dict[str, Any]:
        parts = np.array([PARTS.index(part) for part in examples.parts], dtype=np.int8)
        rows, bad = [], []
        for start in range(0, len(examples.images), CHUNK):
            images = []
            for i in range(start, min(start + CHUNK, len(examples.images))):
                try:
                    images.append(examples.images[i])
                except Unreadable as problem:
                    bad.append(str(problem))
                    parts[i] = PARTS.index("bad")
                    images.append(Image.new("RGB", (8, 8)))
            rows.append(worker.encode(images, spec))
            if report is not None:
                report(start + len(images), len(examples.images))
        if len(bad) > BAD_SHARE * len(parts):
            raise ValueError(
                f"{len(bad)} of {len(parts)} images cannot be read; {'; '.join(bad[:3])}"
            )
        arrays = {"features": np.concatenate(rows), "labels": examples.labels, "parts": parts}
        save_file(arrays, folder / "features.safetensors")
        counts = {"images": len(parts) - len(bad), "unreadable": len(bad), "batch": worker.batch}
        return counts | asdict(read_dataset_text(spec, worker.store))

    return worker.store.get_or_build(spec, build)


@dataclass(frozen=True)
class Target:
    """The features of a dataset by a frozen CLIP, with its split."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N,)
    split: Split
    text: DatasetText
    tokens: Tensor | None = None  # (N, T, V)

    def batch(self, index: Tensor) -> Batch:
        return Batch(self.features[index], None if self.tokens is None else self.tokens[index])

    def labelled(self, index: Tensor) -> Labelled:
        return Labelled(self.batch(index), self.labels[index])


def read_target(
    spec: FeaturesSpec,
    split: SplitSettings,
    store: ArtifactStore,
    tokens: FeaturesSpec | None = None,
) -> Target:
    """Read the features and the split of a dataset, with patch tokens if a trial needs them.

    Raises:
        MissingArtifact: the features are not made yet.
    """
    text = read_dataset_text(spec, store)
    target = _target(store.get(spec).path / "features.safetensors", split, text)
    if tokens is None:
        return target
    return replace(target, tokens=_tokens(store.get(tokens).path / "features.safetensors"))


@lru_cache(maxsize=1)  # patch tokens are large
def _tokens(path: Path) -> Tensor:
    return torch.from_numpy(load_file(path)["features"])


@cache
def _target(path: Path, split: SplitSettings, text: DatasetText) -> Target:
    arrays = load_file(path)
    parts = np.array(PARTS)[arrays["parts"]]
    return Target(
        features=torch.from_numpy(arrays["features"]),
        labels=torch.from_numpy(arrays["labels"]),
        split=make_split(arrays["labels"], parts, split),
        text=text,
    )


# ---------------------------------------------------------------- labels and LoRA


def build_labels(spec: LabelsSpec, worker: WorkerContext) -> Artifact:
    """Select the images that a LoRA is trained on: pseudo-labelled and labelled ones."""

    def build(folder: Path) -> dict[str, Any]:
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
            from orchestrator.stages.evidence import read_evidence

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
        )
        save_file({"index": index.numpy(), "labels": labels.numpy()}, folder / "labels.safetensors")
        # The record contains the accuracy; nothing else reads these true labels.
        right = (target.labels[index] == labels).double().mean().item()
        info = {"images": len(index), "accuracy": right}
        if errors is None:
            return info
        classifier = pool_classifier(text, pool, split.unseen, synthetic, errors)
        agreement = class_agreement(classifier, pool).tolist()
        positions = range(len(agreement)) if split.unseen is None else split.unseen.tolist()
        names = [dataset.classnames[c] for c in positions]
        before = load_file(worker.store.get(labels_before(spec)).path / "labels.safetensors")
        return info | {
            "kept": _share_kept(index.numpy(), labels.numpy(), before),
            "agreement": {n: round(share, 3) for n, share in zip(names, agreement, strict=True)},
        }

    return worker.store.get_or_build(spec, build)


def labels_before(spec: LabelsSpec) -> LabelsSpec:
    """The labels of the LoRA round before, whose evidence chooses these labels."""
    assert spec.evidence is not None
    assert spec.evidence.lora is not None
    return spec.evidence.lora.labels


def _share_kept(index: np.ndarray, labels: np.ndarray, before: dict[str, np.ndarray]) -> float:
    """Share of the labelled images that had the same label in the round before."""
    now = set(zip(index.tolist(), labels.tolist(), strict=True))
    earlier = zip(before["index"].tolist(), before["labels"].tolist(), strict=True)
    return len(now.intersection(earlier)) / len(now)


def build_lora(
    spec: LoraSpec, worker: WorkerContext, report: Callable[[int, int, float], None] | None = None
) -> Artifact:
    """Train the LoRA adapters of a diffusion model on pseudo-labelled pool images.

    Args:
        report: called with the step, the number of all steps and the loss.
    """

    def build(folder: Path) -> dict[str, Any]:
        selected = load_file(worker.store.get(spec.labels).path / "labels.safetensors")
        with worker.unchanged_examples(spec.labels.features.dataset) as examples:
            pixels = np.stack([square(examples.images[i], spec.size) for i in selected["index"]])
        classnames = read_dataset_text(spec.labels.features, worker.store).classnames
        texts = spec.training.caption
        pairs = zip(selected["index"].tolist(), selected["labels"], strict=True)
        return train_lora(
            torch.from_numpy(pixels),
            [text_of(texts, classnames[c], i) for i, c in pairs],
            images_folder(spec.model.name),
            spec.training,
            spec.size,
            folder,
            device=worker.device,
            report=push_and_report,
            kept=checkpoint,
        )

    def push_and_report(step: int, steps: int, loss: float) -> None:
        worker.store.backend.push(checkpoint)
        if report is not None:
            report(step, steps, loss)

    checkpoint = worker.store.checkpoint_path(spec)
    if not worker.store.has(spec):
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        worker.store.backend.pull([checkpoint], overwrite=False)
    artifact = worker.store.get_or_build(spec, build)
    if checkpoint.exists():
        worker.store.backend.remove(checkpoint)
    return artifact
