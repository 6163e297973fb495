"""One function for each stage: builds an artifact from its spec and the artifacts that it nests.

This module does not depend on sweeps or clusters. Images are drawn in `image_rows`.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
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
from air_core.datasets import Examples, get_dataset
from air_core.datasets.images import BAD_SHARE, ImageFiles, Unreadable, too_many_unreadable
from air_core.diffusion import text_of
from air_core.diffusion.lora import square, train_lora
from air_core.diffusion.pipeline import LORA_FILE
from air_core.lora_labels import class_agreement, lora_images, pool_classifier
from air_core.paradigms import make_split
from air_core.specs import UNKNOWN, FeaturesSpec, LabelsSpec, LoraSpec, SplitSettings
from air_core.types import Batch, Labelled, Split
from orchestrator.planning.dataset_text import DatasetText, read_dataset_text
from orchestrator.planning.resolve import images_folder
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.image_rows import lora_before, read_synthetic
from orchestrator.store import ArtifactStore
from orchestrator.store.artifacts import Artifact

PARTS = ("train", "val", "test", "free", "bad")
CHUNK = 512  # images between two reports of progress
LISTED = 100  # unreadable images whose names are recorded


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
        rows: list[np.ndarray] = []
        bad: dict[int, str] = {}  # reason by position
        for start in range(0, len(examples.images), CHUNK):
            positions = range(len(parts))[start : start + CHUNK]
            rows.append(worker.encode(_Readable(examples.images, positions, bad), spec))
            if report is not None:
                report(positions.stop, len(parts))
        parts[list(bad)] = PARTS.index("bad")
        name, problems = spec.dataset.name, list(bad.values())
        if problem := too_many_unreadable(name, problems, len(parts), BAD_SHARE):
            raise ValueError(f"{problem}; `airsweep data check {name}` opens all")
        arrays = {"features": np.concatenate(rows), "labels": examples.labels, "parts": parts}
        save_file(arrays, folder / "features.safetensors")
        counts = {"images": len(parts) - len(bad), "unreadable": len(bad), "batch": worker.batch}
        unused = _unused(examples, bad) | {"skipped": get_dataset(spec.dataset.name).skipped()}
        text = asdict(read_dataset_text(spec, worker.store))
        return counts | {name: value for name, value in unused.items() if value} | text

    return worker.store.get_or_build(spec, build)


@dataclass(frozen=True)
class _Readable(Sequence[Image.Image]):
    """Some images, opened on access: a photograph takes 50 MB. Unreadable ones are blank."""

    images: Sequence[Image.Image]
    positions: range
    bad: dict[int, str]  # receives the reasons, by position

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return replace(self, positions=self.positions[index])
        position = self.positions[index]
        try:
            return self.images[position]
        except Unreadable as problem:
            self.bad[position] = str(problem)
            return Image.new("RGB", (8, 8))


def _unused(examples: Examples, bad: Mapping[int, str]) -> dict[str, Any]:
    """Paths below the dataset's folder and reasons of the first unreadable images."""
    if not isinstance(examples.images, ImageFiles):
        return {}
    files = examples.images.files
    return {
        "unreadable_files": {
            str(files[i].relative_to(examples.images.home)): why.removeprefix(
                f"{files[i]} cannot be read: "
            )
            for i, why in itertools.islice(bad.items(), LISTED)
        }
    }


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

    return worker.store.get_or_build(spec, build)


def known_accuracy(predicted: Tensor, labels: Tensor) -> float | None:
    """Share of right predictions (N,) on the images whose label (N,) is known; None: none is."""
    known = labels != UNKNOWN
    return (predicted == labels)[known].double().mean().item() if bool(known.any()) else None


def _share_kept(
    index: np.ndarray, labels: np.ndarray, spec: LabelsSpec, store: ArtifactStore
) -> float:
    """Share of the images of both rounds that have the same label in both."""
    before = load_file(store.get(lora_before(spec).labels).path / "labels.safetensors")
    now = set(zip(index.tolist(), labels.tolist(), strict=True))
    earlier = zip(before["index"].tolist(), before["labels"].tolist(), strict=True)
    return len(now.intersection(earlier)) / max(len(now), len(before["index"]))


def build_lora(
    spec: LoraSpec, worker: WorkerContext, report: Callable[[int, int, float], None] | None = None
) -> Artifact:
    """Train the LoRA adapters of a diffusion model on pseudo-labelled pool images.

    If too few labels changed since the round before, its adapters are copied.

    Args:
        report: called with the step, the number of all steps and the loss.
    """

    def build(folder: Path) -> dict[str, Any]:
        labels = worker.store.get(spec.labels)
        if labels.record["info"].get("kept", 0.0) >= spec.enough_kept:
            before = worker.store.get(lora_before(spec.labels)).path / LORA_FILE
            shutil.copy(before, folder / LORA_FILE)
            return {"copied": True}
        selected = load_file(labels.path / "labels.safetensors")
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
