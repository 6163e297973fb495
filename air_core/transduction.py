"""Text scores refined by a mixture model over the whole unlabelled pool: no training, no images.

In the manner of TransCLIP (arXiv:2406.01837): one Gaussian a class with a shared diagonal
covariance on image features, responsibilities pulled towards the text scores and towards those of
neighbouring images. A rival to auxiliary classifiers that needs no diffusion, and a source of
pseudo-labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_core.classifiers import Classifier
from air_core.types import Batch

# N images, U classes that pool images are from (all but in TRZSL), D feature width.

ROUNDS = 10
NEIGHBOURS = 3
CHUNK = 2048  # images whose cosines to the pool are held at a time


@dataclass(frozen=True)
class MixtureClassifier:
    """Text logits plus the log-likelihood of the features under each class's Gaussian."""

    text: Classifier
    means: Tensor  # (U, D), unit length
    precision: Tensor  # (D,) of the shared covariance
    unseen: Tensor | None

    def logits(self, batch: Batch) -> Tensor:
        """(N, C); in TRZSL what the text gives to unseen classes together stays."""
        logits = self.text.logits(batch).log_softmax(dim=-1)
        likelihood = _log_likelihood(batch.features, self.means, self.precision)
        if self.unseen is None:
            return logits + likelihood
        own = logits[:, self.unseen]
        shared = (own + likelihood).log_softmax(dim=-1) + own.logsumexp(dim=-1, keepdim=True)
        return logits.index_copy(1, self.unseen, shared)


@torch.no_grad()
def transductive(text: Classifier, pool: Batch, unseen: Tensor | None = None) -> MixtureClassifier:
    """Fit the mixture on the pool, starting from the text classifier's scores.

    Args:
        pool: at least two images.
        unseen: (U,) TRZSL: the classes that pool images are from.
    """
    logits = text.logits(pool)
    if unseen is not None:
        logits = logits[:, unseen]
    believed = logits.log_softmax(dim=-1)  # (N, U)
    features = pool.features
    near, affinity = _neighbours(features)
    shares = believed.exp()
    precision = torch.full((features.shape[1],), float(features.shape[1]))
    means = _means(features, shares)
    for _ in range(ROUNDS):
        pulled = (affinity[:, :, None] * shares[near]).sum(dim=1)  # (N, U)
        likelihood = _log_likelihood(features, means, precision)
        shares = (believed + likelihood + pulled).softmax(dim=-1)
        means = _means(features, shares)
        precision = 1 / _variance(features, shares, means)
    return MixtureClassifier(text, means, precision, unseen)


def _means(features: Tensor, shares: Tensor) -> Tensor:  # (U, D)
    # A class that nobody believes in keeps a direction: its few shares still point somewhere.
    return normalize(shares.T @ features, dim=-1)


def _variance(features: Tensor, shares: Tensor, means: Tensor) -> Tensor:  # (D,)
    second = (features**2).mean(dim=0)
    weight = shares.mean(dim=0)[:, None]  # (U, 1)
    cross = (means * (shares.T @ features) / len(features)).sum(dim=0)
    spread: Tensor = second - 2 * cross + (weight * means**2).sum(dim=0)
    return spread.clamp(min=1e-6)


def _log_likelihood(features: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """(N, U), up to what is the same for every class."""
    weighted = means * precision  # (U, D)
    return features @ weighted.T - 0.5 * (weighted * means).sum(dim=-1)


def _neighbours(features: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and cosines of the nearest other images, both (N, k)."""
    count = min(NEIGHBOURS, len(features) - 1)
    near, cosines = [], []
    for start in range(0, len(features), CHUNK):
        part = features[start : start + CHUNK] @ features.T
        part[torch.arange(len(part)), torch.arange(start, start + len(part))] = -1.0
        best = part.topk(count, dim=-1)
        near.append(best.indices)
        cosines.append(best.values.clamp(min=0))
    return torch.cat(near), torch.cat(cosines)
