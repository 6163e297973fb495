"""How good a classifier is, and what a search may look at."""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.classifiers import Classifier
from air_core.types import Batch, Labelled, Metrics

# N images, C classes, U unseen classes.


def measured(
    predictions: Tensor, labels: Tensor, num_classes: int, unseen: Tensor | None = None
) -> Metrics:
    """Share of right predictions: over all, per class and, in TRZSL, over seen and unseen classes.

    Args:
        predictions: (N,) class indices, out of all classes.
        labels: (N,) true classes.
        unseen: (U,) classes of TRZSL that had no label.

    Source: the harmonic mean of the two accuracies over images is GRIP's measure for TRZSL
    (arXiv:2306.01669).
    """
    right = (predictions == labels).double()
    per_class = tuple(right[labels == c].mean().item() for c in range(num_classes))
    found = Metrics(accuracy=right.mean().item(), per_class=per_class, predictions=predictions)
    if unseen is None:
        return found
    of_unseen = torch.isin(labels, unseen)
    one, other = right[~of_unseen].mean().item(), right[of_unseen].mean().item()
    return Metrics(
        accuracy=found.accuracy,
        per_class=per_class,
        predictions=predictions,
        seen=one,
        unseen=other,
        harmonic_mean=harmonic_mean(one, other),
    )


def harmonic_mean(one: float, other: float) -> float:
    """
    >>> harmonic_mean(0.5, 1.0), harmonic_mean(0.0, 0.0)
    (0.6666666666666666, 0.0)
    """
    total = one + other
    return 2 * one * other / total if total else 0.0


@torch.no_grad()
def objectives(
    classifier: Classifier,
    pool: Batch,
    validation: Labelled | None,
    unseen: Tensor | None = None,
) -> dict[str, float]:
    """All that a search may see. No test image and no test label comes in here.

    `validation_accuracy` reads validation labels (in TRZSL it is the harmonic mean);
    `mutual_information` reads none (in TRZSL over unseen classes, which pool images are from).
    """
    logits = classifier.logits(pool)
    if unseen is not None:
        logits = logits[:, unseen]
    found = {"mutual_information": mutual_information(logits.softmax(dim=-1))}
    if validation is not None:
        logits = classifier.logits(validation.batch)
        metrics = measured(logits.argmax(dim=-1), validation.labels, logits.shape[1], unseen)
        found["validation_accuracy"] = metrics.headline
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
