"""The images that an auxiliary classifier is built from, and one that compares with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from air_core.chunks import by_rows
from air_core.classifiers import LinearClassifier
from air_core.types import Encoded

# N images, C classes, D feature width.

CACHE_SHARPNESS = 5.5  # Tip-Adapter's beta (arXiv:2111.03930)
COSINES = 2**25  # of a chunk of images with the bank, 128 MiB


@dataclass(frozen=True)
class BankClassifier:
    """Compares an image with every image of a bank, class by class.

    With `nearest` k: mean cosine to the k nearest images of each class. With 0: Tip-Adapter's cache
    model (arXiv:2111.03930), with affinities averaged within a class.
    """

    bank: Tensor  # (N, D), centred, unit length
    labels: Tensor  # (N,), every class 0 .. C - 1 at least max(1, nearest) times
    center: Tensor  # (D,), subtracted from features
    nearest: int
    sharpness: float

    def logits(self, batch: Encoded) -> Tensor:
        """(B, C)"""
        return by_rows(self._logits, batch.features, width=len(self.bank), elements=COSINES)

    def _logits(self, x: Tensor) -> Tensor:
        cosines = normalize(x - self.center, dim=-1) @ self.bank.T  # (B, N)
        return self.sharpness * (self._nearest if self.nearest else self._cache)(cosines)

    def _nearest(self, cosines: Tensor) -> Tensor:
        padded = cosines[:, self._places.clamp(min=0)].masked_fill(self._places < 0, -torch.inf)
        return padded.topk(self.nearest, dim=-1).values.mean(dim=-1)

    @cached_property  # torch.export cannot trace sizes that depend on values
    def _places(self) -> Tensor:
        """(C, M) images of each class, then -1."""
        members = [(self.labels == c).nonzero().flatten() for c in range(self._num_classes)]
        return pad_sequence(members, batch_first=True, padding_value=-1)

    def _cache(self, cosines: Tensor) -> Tensor:
        members = cosines.new_zeros(len(self.labels), self._num_classes)  # (N, C)
        members.scatter_(1, self.labels[:, None], 1.0)
        return (-CACHE_SHARPNESS * (1 - cosines)).exp() @ members / members.sum(dim=0)

    @cached_property
    def _num_classes(self) -> int:
        return int(self.labels.max()) + 1


AuxiliaryClassifier = LinearClassifier | BankClassifier


@dataclass(frozen=True)
class Bank:
    """Images that an auxiliary classifier is built from."""

    settings: Any  # AuxiliarySettings, or the own settings of a plugin's component
    features: Tensor  # (N, D), centred
    labels: Tensor  # (N,)
    counts: Tensor  # (C,) images of each class
    center: Tensor  # (D,)
    sharpness: float

    @property
    def unit(self) -> Tensor:  # (N, D)
        return normalize(self.features, dim=-1)

    def means(self, features: Tensor) -> Tensor:
        """Class means (C, D) of features (N, D) of the same images."""
        sums = features.new_zeros(len(self.counts), features.shape[1])
        return sums.index_add_(0, self.labels, features) / self.counts[:, None]

    def compared(self, nearest: int) -> BankClassifier:
        """The classifier that compares with the `nearest` images of each class; 0: with all."""
        return BankClassifier(self.unit, self.labels, self.center, nearest, self.sharpness)
