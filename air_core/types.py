"""Images, labels and results that the method passes on. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# N images, C classes, D feature width, T image tokens, V their width; M selected images, B of them.

ROWS = 4096  # images whose dense targets are in memory at a time


@dataclass(frozen=True)
class Encoded:
    """Images as encoded by a frozen CLIP."""

    features: Tensor  # (N, D), unit length
    tokens: Tensor | None = None  # (N, T, V) before the first block, for visual prompts

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Tensor) -> Encoded:
        tokens = None if self.tokens is None else self.tokens[index]
        return Encoded(features=self.features[index], tokens=tokens)

    def to(self, device: torch.device) -> Encoded:
        """The same images, from the CPU on a device; the host does not wait for the copy."""
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=True)
        return Encoded(self.features.to(device, non_blocking=True), tokens)

    @staticmethod
    def joined(parts: Sequence[Encoded]) -> Encoded:
        """Concatenate batches, with tokens where all of them have tokens."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return Encoded(
            features=torch.cat([part.features for part in parts]),
            tokens=torch.cat(tokens) if len(tokens) == len(parts) else None,
        )


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset, 0 .. C - 1, and among them the U classes of its pool.

    In TRZSL these are the unseen ones, counted from 0 in ascending order; otherwise all, and U = C.
    """

    count: int  # C
    unseen: Tensor | None = None  # (U,)

    @property
    def of_pool(self) -> Tensor:
        """(U,) numbers among all classes."""
        return torch.arange(self.count) if self.unseen is None else self.unseen

    def columns(self, scores: Tensor) -> Tensor:
        """(N, C) -> (N, U)"""
        return scores if self.unseen is None else scores[:, self.unseen]

    def numbers(self, predictions: Tensor) -> Tensor:
        """(N,) classes of the pool, counted among all classes."""
        return predictions if self.unseen is None else self.unseen[predictions]


@dataclass(frozen=True)
class Labelled:
    """Images with their classes."""

    images: Encoded
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Labelled:
        return Labelled(self.images[index], self.labels[index])

    @staticmethod
    def joined(parts: Sequence[Labelled]) -> Labelled:
        labels = torch.cat([part.labels for part in parts])
        return Labelled(Encoded.joined([part.images for part in parts]), labels)

    def of(self, classes: Classes) -> Labelled:
        """The images of the pool's classes."""
        if classes.unseen is None:
            return self
        return self[torch.isin(self.labels, classes.unseen)]

    def among(self, classes: Classes) -> Labelled:
        """The images of the pool's classes, with labels that count these."""
        kept = self.of(classes)
        return Labelled(kept.images, torch.searchsorted(classes.of_pool, kept.labels))


@dataclass(frozen=True)
class Split:
    """Positions in a dataset's file list, ascending and disjoint."""

    pool: Tensor  # (P,) unlabelled
    labelled: Tensor  # (L,) images whose labels the method reads; empty in UL
    validation: Tensor  # (V,), empty where the pool contains it
    test: Tensor  # (T,)
    unseen: Tensor | None  # (U,) TRZSL: classes of the pool images, ascending; else None


@dataclass(frozen=True)
class SparseTargets:
    """Targets (M, C) that are stored without zeros; an index gives dense rows.

    Entries `starts[m]` to `starts[m + 1]` are those of image m. One more entry, the last, is 0 and
    pads rows to the same length, so that no operation reads a number from a device.
    """

    starts: Tensor  # (M + 1,)
    classes: Tensor  # (E + 1,) int32
    values: Tensor  # (E + 1,)
    num_classes: int
    longest: int  # most entries of an image

    @staticmethod
    def of(parts: Iterable[Tensor]) -> SparseTargets:
        """From dense targets (B, C), in parts that follow each other; at least one."""
        counts, classes, values = [], [], []
        for part in parts:
            found = part.nonzero(as_tuple=True)
            counts.append((part != 0).sum(dim=1))
            classes.append(found[1].int())
            values.append(part[found])
        of_each = torch.cat(counts)
        return SparseTargets(
            starts=torch.cat([of_each.new_zeros(1), of_each.cumsum(dim=0)]),
            classes=torch.cat([*classes, classes[0].new_zeros(1)]),
            values=torch.cat([*values, values[0].new_zeros(1)]),
            num_classes=part.shape[1],
            longest=int(of_each.max()) if len(of_each) else 0,
        )

    @staticmethod
    def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> SparseTargets:
        """1 for the class of each image, from labels (M,)."""
        ones = torch.ones(len(labels), dtype=dtype, device=labels.device)
        return SparseTargets(
            starts=torch.arange(len(labels) + 1, device=labels.device),
            classes=torch.cat([labels, labels.new_zeros(1)]).int(),
            values=torch.cat([ones, ones.new_zeros(1)]),
            num_classes=num_classes,
            longest=1,
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Dense targets (B, C) of images."""
        at = self._entries(rows)
        dense = self.values.new_zeros(len(rows), self.num_classes)
        return dense.scatter_add_(1, self.classes[at].long(), self.values[at])

    def update(self, dense: Callable[[Tensor], Tensor]) -> None:
        """Replace all entries by those that `dense` gives: targets (B, C) of positions (B,)."""
        for rows in torch.split(torch.arange(len(self), device=self.starts.device), ROWS):
            at = self._entries(rows)
            self.values[at] = dense(rows).gather(1, self.classes[at].long())
        self.values[-1] = 0

    def _entries(self, rows: Tensor) -> Tensor:  # (B, longest)
        begin, end = self.starts[rows], self.starts[rows + 1]
        at = begin[:, None] + torch.arange(self.longest, device=begin.device)
        return at.where(at < end[:, None], len(self.values) - 1)

    def dense(self) -> Tensor:
        """(M, C)"""
        return self[torch.arange(len(self), device=self.starts.device)]

    def among_all(self, classes: Classes) -> SparseTargets:
        """The same targets, of classes of the pool, over all classes."""
        numbers = classes.numbers(self.classes.long()).int()
        return replace(self, classes=numbers, num_classes=classes.count)

    def to(self, device: torch.device) -> SparseTargets:
        """The same targets on a device."""
        starts, classes = self.starts.to(device), self.classes.to(device)
        return replace(self, starts=starts, classes=classes, values=self.values.to(device))


Targets = Tensor | SparseTargets  # (M, C)


def sparse(targets: Targets) -> SparseTargets:
    """Targets without zeros."""
    if isinstance(targets, SparseTargets):
        return targets
    return SparseTargets.of(torch.split(targets, ROWS))


@dataclass(frozen=True)
class PseudoLabels:
    """Selected pool images with their targets.

    An image takes a slot of one class only, although its target may cover several.
    """

    indices: Tensor  # (M,) positions in the pool
    targets: Targets  # (M, C) one-hot, soft, or multi-hot for the candidate sets of CPL
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
    pool_probability: Tensor  # (P,) likewise; in TRZSL among unseen classes
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
    prompt: Tensor | None  # the learned vectors; None: the trial has no rounds
    seconds: float

    @property
    def inference(self) -> dict[str, float]:
        """Main test metric of each classifier, by its name."""
        return {name: each.test.headline for name, each in self.classifiers.items()}
