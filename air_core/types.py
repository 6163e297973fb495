"""What moves through the method and what comes out of it. Needs torch's Tensor only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# N images, C classes, D feature width.


@dataclass(frozen=True)
class Batch:
    """Images as a frozen CLIP sees them."""

    features: Tensor  # (N, D), unit length

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Tensor) -> Batch:
        return Batch(features=self.features[index])


@dataclass(frozen=True)
class Labelled:
    """Images with their classes."""

    batch: Batch
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Positions in a dataset's file list, ascending and disjoint."""

    pool: Tensor  # (P,) unlabelled
    validation: Tensor  # (V,), empty where the pool has taken it
    test: Tensor  # (T,)


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


@dataclass(frozen=True)
class TrialResult:
    """What one trial found.

    `objectives` is all that a search may see; nothing in it was computed from a test label.
    """

    objectives: dict[str, float]
    test: Metrics
    inference: dict[str, float]  # test accuracy of text, fused and auxiliary
    pool_predictions: Tensor  # (P,) what the fused classifier takes pool images for in the end
    seconds: float
