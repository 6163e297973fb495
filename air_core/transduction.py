"""Refine text scores with a Gaussian mixture over the unlabelled pool; nothing is trained.

After TransCLIP (arXiv:2406.01837): one Gaussian per class with a shared diagonal covariance of
image features. Responsibilities stay close to the text scores and to those of neighbouring images.
It is an alternative to the auxiliary classifier that needs no synthetic images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_core.classifiers import Classifier
from air_core.settings.components import TRANSDUCTIONS
from air_core.tools.chunks import by_rows, chunks
from air_core.types import Classes, Encoded

# N images, U classes of the pool (all classes, in TRZSL the unseen ones), D feature width.

ROUNDS = 10
NEIGHBOURS = 3
CHUNK = 2048  # most images whose cosines to the pool are in memory at a time
COSINES = 2**27  # most of these cosines, 512 MiB


@dataclass(frozen=True)
class MixtureClassifier:
    """Text logits plus the log-likelihood of the features under each class's Gaussian."""

    text: Classifier
    means: Tensor  # (U, D), unit length
    precision: Tensor  # (D,) of the shared covariance
    classes: Classes

    def logits(self, batch: Encoded) -> Tensor:
        """(N, C); in TRZSL the total score of the unseen classes does not change."""
        return by_rows(self._refined, self.text.logits(batch), batch.features)

    def _refined(self, logits: Tensor, features: Tensor) -> Tensor:
        logits = logits.log_softmax(dim=-1)
        likelihood = _log_likelihood(features, self.means, self.precision)
        if self.classes.unseen is None:
            return logits + likelihood
        text = self.classes.columns(logits)
        refined = (text + likelihood).log_softmax(dim=-1) + text.logsumexp(dim=-1, keepdim=True)
        return logits.index_copy(1, self.classes.unseen, refined)


@TRANSDUCTIONS.add("none", summary="no refinement")
def unchanged(text: Classifier, pool: Encoded, classes: Classes) -> Classifier:
    return text


@TRANSDUCTIONS.add("gmm", summary="text scores are refined by a mixture model over the whole pool")
@torch.no_grad()
def transductive(text: Classifier, pool: Encoded, classes: Classes) -> MixtureClassifier:
    """Fit the mixture on the pool, starting from the text classifier's scores.

    Args:
        pool: at least two images.
    """
    logits, features = classes.columns(text.logits(pool)), pool.features
    near, affinity = _neighbours(features)

    def refined(logits: Tensor, features: Tensor, near: Tensor, affinity: Tensor) -> Tensor:
        likelihood = _log_likelihood(features, means, precision)
        neighbours = (affinity[:, :, None] * shares[near]).sum(dim=1)
        return (logits.log_softmax(dim=-1) + likelihood + neighbours).softmax(dim=-1)

    shares = by_rows(lambda logits: logits.log_softmax(dim=-1).exp(), logits)
    precision = torch.full_like(features[0], float(features.shape[1]))
    sums, second = shares.T @ features, _mean_square(features, logits.shape[1])
    means = _means(sums)
    for _ in range(ROUNDS):
        shares = by_rows(refined, logits, features, near, affinity)
        sums = shares.T @ features  # (U, D)
        means = _means(sums)
        precision = 1 / _variance(second, sums, shares, means)
    return MixtureClassifier(text, means, precision, classes)


def _means(sums: Tensor) -> Tensor:  # (U, D)
    # Normalising keeps a direction even for a class with almost no responsibility.
    return normalize(sums, dim=-1)


def _mean_square(features: Tensor, width: int) -> Tensor:  # (D,)
    parts = [(features[rows] ** 2).sum(dim=0) for rows in chunks(len(features), width)]
    return torch.stack(parts).sum(dim=0) / len(features)


def _variance(second: Tensor, sums: Tensor, shares: Tensor, means: Tensor) -> Tensor:  # (D,)
    weight = shares.mean(dim=0)[:, None]  # (U, 1)
    cross = (means * sums / len(shares)).sum(dim=0)
    spread: Tensor = second - 2 * cross + (weight * means**2).sum(dim=0)
    return spread.clamp(min=1e-6)


def _log_likelihood(features: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """(N, U), up to a term that is equal for all classes."""
    weighted = means * precision  # (U, D)
    return features @ weighted.T - 0.5 * (weighted * means).sum(dim=-1)


def _neighbours(features: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and cosines of the nearest other images, both (N, k)."""
    count = min(NEIGHBOURS, len(features) - 1)
    near, cosines = [], []
    for rows in chunks(len(features), max(len(features), COSINES // CHUNK), COSINES):
        part = features[rows] @ features.T
        part.diagonal(rows.start).fill_(-1.0)
        best = part.topk(count, dim=-1)
        near.append(best.indices)
        cosines.append(best.values.clamp(min=0))
    return torch.cat(near), torch.cat(cosines)
