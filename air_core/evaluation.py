"""How good a classifier is, and what a search may look at."""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.classifiers import Classifier
from air_core.types import Batch, Labelled, Metrics


def accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> Metrics:
    """Share of right predictions, over all and per class.

    Args:
        predictions: (N,) class indices.
        labels: (N,) true classes.
    """
    right = (predictions == labels).double()
    per_class = tuple(right[labels == c].mean().item() for c in range(num_classes))
    return Metrics(accuracy=right.mean().item(), per_class=per_class, predictions=predictions)


@torch.no_grad()
def objectives(
    classifier: Classifier, pool: Batch, validation: Labelled | None
) -> dict[str, float]:
    """All that a search may see. No test image and no test label comes in here.

    `validation_accuracy` reads validation labels; `mutual_information` reads none.
    """
    found = {"mutual_information": mutual_information(classifier.logits(pool).softmax(dim=-1))}
    if validation is not None:
        logits = classifier.logits(validation.batch)
        metrics = accuracy(logits.argmax(dim=-1), validation.labels, logits.shape[1])
        found["validation_accuracy"] = metrics.accuracy
    return found


def mutual_information(scores: Tensor) -> float:
    """Entropy of the mean scores minus mean entropy of the scores, in nats.

    High when single predictions are sure and classes are used evenly.

    Args:
        scores: (N, C); rows sum to 1.
    """
    return float(_entropy(scores.mean(dim=0)) - _entropy(scores).mean())


def _entropy(scores: Tensor) -> Tensor:  # (..., C) -> (...)
    parts: Tensor = torch.special.entr(scores.double())
    return parts.sum(dim=-1)
