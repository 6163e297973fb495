"""Images, labels and results that the method passes on. Imports torch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# N images, C classes, D feature width, T image tokens, V their width.


@dataclass(frozen=True)
class Batch:
    """Images as encoded by a frozen CLIP."""

    features: Tensor  # (N, D), unit length
    tokens: Tensor | None = None  # (N, T, V) before the first block, for visual prompts

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Tensor) -> Batch:
        tokens = None if self.tokens is None else self.tokens[index]
        return Batch(features=self.features[index], tokens=tokens)

    def to(self, device: torch.device) -> Batch:
        """The same images, from the CPU on a device; the host does not wait for the copy."""
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=True)
        return Batch(self.features.to(device, non_blocking=True), tokens)

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """Concatenate batches, with tokens where all of them have tokens."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return Batch(
            features=torch.cat([part.features for part in parts]),
            tokens=torch.cat(tokens) if len(tokens) == len(parts) else None,
        )


@dataclass(frozen=True)
class Labelled:
    """Images with their classes."""

    batch: Batch
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Labelled:
        return Labelled(self.batch[index], self.labels[index])

    def of(self, classes: Tensor | None) -> Labelled:
        """The images of some classes; None: all images."""
        return self if classes is None else self[torch.isin(self.labels, classes)]

    def among(self, classes: Tensor) -> Labelled:
        """The images of some classes; labels become positions in `classes`, which ascend."""
        kept = self.of(classes)
        return Labelled(kept.batch, torch.searchsorted(classes, kept.labels))


@dataclass(frozen=True)
class Split:
    """Positions in a dataset's file list, ascending and disjoint."""

    pool: Tensor  # (P,) unlabelled
    labelled: Tensor  # (L,) images whose labels the method reads; empty in UL
    validation: Tensor  # (V,), empty where the pool contains it
    test: Tensor  # (T,)
    unseen: Tensor | None  # (U,) TRZSL: classes of the pool images, ascending; else None


@dataclass(frozen=True)
class PseudoLabels:
    """Selected pool images with their targets.

    An image takes a slot of one class only, although its target may cover several.
    """

    indices: Tensor  # (M,) positions in the pool
    targets: Tensor  # (M, C) one-hot, soft, or multi-hot for the candidate sets of CPL
    labels: Tensor  # (M,) the class whose slot the image takes

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Metrics:
    """Metrics of a classifier on labelled images. Fractions in [0, 1]."""

    accuracy: float
    per_class: tuple[float, ...]  # recall of each class; nan where a class has no image
    predictions: Tensor  # (N,) int64, per image
    # TRZSL only: accuracy on test images of seen and of unseen classes, and their harmonic mean.
    seen: float | None = None
    unseen: float | None = None
    harmonic_mean: float | None = None

    @property
    def headline(self) -> float:
        """The metric of the paradigm: the harmonic mean in TRZSL, otherwise the accuracy."""
        return self.accuracy if self.harmonic_mean is None else self.harmonic_mean


@dataclass(frozen=True)
class ClassifierResult:
    """One of the classifiers of a trial on the test images, and what is known without them."""

    test: Metrics
    temperature: float  # that the logits are divided by, for probabilities
    probability: Tensor  # (T,) of the predicted class, at this temperature
    calibration_error: tuple[float, float]  # of the test images, at temperature 1 and at this one
    pool: Tensor  # (P,) predicted classes of the pool images
    pool_probability: Tensor  # (P,) of the predicted class; in TRZSL among unseen classes
    objectives: dict[str, float]  # see `evaluation.objectives`; and `agreement`


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial.

    A search may read `objectives` only, which are computed without any test label.
    """

    objectives: dict[str, float]  # of the text classifier
    test: Metrics  # of the learned prompt; without a prompt, of the fused classifier
    classifiers: dict[str, ClassifierResult]  # by name: text, auxiliary, fused
    fused: Any  # air_core.classifiers.FusedClassifier
    pool_predictions: Tensor  # (P,) of the fused classifier, after the last round
    synthetic: int  # number of synthetic images used
    prompt: Tensor | None  # the learned vectors; None: the trial has no rounds
    seconds: float

    @property
    def inference(self) -> dict[str, float]:
        """Main test metric of each classifier, by its name."""
        return {name: each.test.headline for name, each in self.classifiers.items()}
