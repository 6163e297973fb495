"""Metrics of a classifier, and the objectives that a search may read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from air_core.classifiers import Classifier, matching_sharpness
from air_core.tools.chunks import chunks
from air_core.types import Classes, Encoded, Labelled, Metrics

# N images, C classes, U unseen classes.

CALIBRATION_BINS = 15


def measured(predictions: Tensor, labels: Tensor, classes: Classes) -> Metrics:
    """Accuracy over all images, per class and, in TRZSL, over seen and over unseen classes.

    Args:
        predictions: (N,) class indices, out of all classes.
        labels: (N,) true classes.

    Source: GRIP (arXiv:2306.01669) reports TRZSL by the harmonic mean of both accuracies.
    """
    right = (predictions == labels).double()
    per_class = tuple(right[labels == c].mean().item() for c in range(classes.count))
    metrics = Metrics(accuracy=right.mean().item(), per_class=per_class, predictions=predictions)
    if classes.unseen is None:
        return metrics
    is_unseen = torch.isin(labels, classes.unseen)
    seen, unseen = right[~is_unseen].mean().item(), right[is_unseen].mean().item()
    both = seen + unseen
    harmonic_mean = 2 * seen * unseen / both if both else 0.0
    return replace(metrics, seen=seen, unseen=unseen, harmonic_mean=harmonic_mean)


@torch.no_grad()
def objectives(
    classifier: Classifier, pool: Encoded, validation: Labelled | None, classes: Classes
) -> dict[str, float]:
    """Objectives of a search. They read no test image and no test label.

    `validation_accuracy` reads validation labels (in TRZSL it is the harmonic mean).
    `mutual_information` reads no label (in TRZSL it is over unseen classes, those of the pool).
    """
    logits = classifier.logits(pool)
    values = {"mutual_information": _mutual_information(_scores(logits, classes), len(logits))}
    if validation is not None:
        logits = classifier.logits(validation.images)
        metrics = measured(logits.argmax(dim=-1), validation.labels, classes)
        values["validation_accuracy"] = metrics.headline
    return values


def agreement(predicted: Tensor, votes: Sequence[Tensor]) -> float:
    """Share of pool images to which another classifier gives the same class: the mean over votes.

    Args:
        predicted: (P,) classes.
        votes: (P,) each, the classes that other classifiers predict, at least one; -1: none.
    """
    shares = [(predicted == vote)[vote >= 0].double().mean().item() for vote in votes]
    return sum(shares) / len(shares)


@torch.no_grad()
def calibrated_temperature(classifier: Classifier, validation: Labelled | None) -> float:
    """The temperature at which the mean confidence on validation images is their accuracy.

    Equal means leave no error of calibration on average; on the tuning splits of the digits this
    has a smaller expected calibration error than the temperature of the smallest loss (Guo et al.,
    arXiv:1706.04599), see docs/experiments.md. 1 without validation images.
    """
    if validation is None:
        return 1.0
    logits = classifier.logits(validation.images)
    right = int((logits.argmax(dim=-1) == validation.labels).sum())
    # One image right and one wrong are added, so that no temperature is 0.
    return 1 / matching_sharpness(logits, (right + 1) / (len(validation) + 2))


def calibration_error(probability: Tensor, right: Tensor) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins of equal
    width, weighted by their images (Guo et al., arXiv:1706.04599).

    Args:
        probability: (N,) of the predicted classes.
        right: (N,) whether they are the true ones.
    """
    bins = (probability.double() * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, probability.double() - right.double())
    return (gaps.abs().sum() / len(right)).item()


def _mutual_information(parts: Iterable[Tensor], images: int) -> float:
    """Entropy of the mean scores minus mean entropy of the scores, in nats.

    It is high where each prediction is confident and the predictions cover the classes evenly.

    Args:
        parts: scores (N, C) in chunks of rows; rows sum to 1.
        images: N.
    """
    sums, entropies = zip(*((part.sum(dim=0), _entropy(part)) for part in parts), strict=True)
    mean = torch.stack(sums).sum(dim=0) / images
    return float(_entropy(mean) - torch.cat(entropies).mean())


def _scores(logits: Tensor, classes: Classes, temperature: float = 1.0) -> Iterator[Tensor]:
    """Softmax of logits (N, C) over the classes of the pool, in chunks of rows."""
    for rows in chunks(*logits.shape):
        yield (classes.columns(logits[rows]) / temperature).softmax(dim=-1)


def most_probable(
    logits: Tensor, classes: Classes, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Largest score (N,) and its position (N,) of each row of logits (N, C).

    Args:
        classes: the softmax is over those of the pool, and positions count these.
        temperature: divides the logits.
    """
    best = [scores.max(dim=-1) for scores in _scores(logits, classes, temperature)]
    return torch.cat([each.values for each in best]), torch.cat([each.indices for each in best])


def _entropy(scores: Tensor) -> Tensor:  # (..., C) -> (...)
    parts: Tensor = torch.special.entr(scores.double())
    return parts.sum(dim=-1)
