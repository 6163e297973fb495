"""What moves through the method and what comes out of it. Needs torch's Tensor only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# N images, C classes, D feature width, T image tokens, V their width.


@dataclass(frozen=True)
class Batch:
    """Images as a frozen CLIP sees them."""

    features: Tensor  # (N, D), unit length
    tokens: Tensor | None = None  # (N, T, V) before the first block, for visual prompts

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Tensor) -> Batch:
        tokens = None if self.tokens is None else self.tokens[index]
        return Batch(features=self.features[index], tokens=tokens)

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """One after the other; tokens where all have some."""
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
        """Those of some classes; None: all."""
        return self if classes is None else self[torch.isin(self.labels, classes)]

    def among(self, classes: Tensor) -> Labelled:
        """Those of some classes, ascending, which become 0, 1, ..."""
        kept = self.of(classes)
        return Labelled(kept.batch, torch.searchsorted(classes, kept.labels))


@dataclass(frozen=True)
class Split:
    """Positions in a dataset's file list, ascending and disjoint."""

    pool: Tensor  # (P,) unlabelled
    labelled: Tensor  # (L,) their labels may be used; empty in UL
    validation: Tensor  # (V,), empty where the pool has taken it
    test: Tensor  # (T,)
    unseen: Tensor | None  # (U,) TRZSL: classes that pool images are from, ascending; else None


@dataclass(frozen=True)
class PseudoLabels:
    """Chosen pool images and what they are trained towards.

    An image may be chosen by one class only; its target may still spread over several.
    """

    indices: Tensor  # (M,) positions in the pool
    targets: Tensor  # (M, C) one-hot, multi-hot or soft: CPL trains on the whole candidate set
    labels: Tensor  # (M,) the class whose place the image took

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Metrics:
    """How well a classifier did on labelled images. Fractions in [0, 1]."""

    accuracy: float
    per_class: tuple[float, ...]  # recall of each class; nan where a class has no image
    predictions: Tensor  # (N,) int64, per image
    # TRZSL alone: accuracy on test images of seen and of unseen classes, and their harmonic mean.
    seen: float | None = None
    unseen: float | None = None
    harmonic_mean: float | None = None

    @property
    def headline(self) -> float:
        """What the paradigm is judged by: the harmonic mean in TRZSL, accuracy elsewhere."""
        return self.accuracy if self.harmonic_mean is None else self.harmonic_mean


@dataclass(frozen=True)
class TrialResult:
    """What one trial found.

    `objectives` is all that a search may see; nothing in it was computed from a test label.
    """

    objectives: dict[str, float]
    test: Metrics
    inference: dict[str, float]  # headline test metric of text, fused and auxiliary
    pool_predictions: Tensor  # (P,) what the fused classifier takes pool images for in the end
    synthetic: int  # images that were used
    prompt: Tensor | None  # the learned vectors; None: nothing was learned
    seconds: float
