"""From scores to training targets. A strategy is a pure function of scores and of the round.

True labels never come in here.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from air_core.pseudo_labels import candidates, top_k
from air_core.pseudo_labels.threshold import threshold
from air_core.specs import PseudoLabelSettings
from air_core.types import PseudoLabels


class Strategy(Protocol):
    """Chooses pool images and what each is trained towards."""

    def __call__(
        self,
        scores: Tensor,
        settings: PseudoLabelSettings,
        *,
        capacity: int,
        iteration: int,
        previous: PseudoLabels | None,
    ) -> PseudoLabels:
        """Scores (P, C) of the pool; at most `capacity` images per class."""
        ...


STRATEGIES: dict[str, Strategy] = {
    "top_k": top_k.top_k,
    "threshold": threshold,
    "candidates": candidates.candidates,
}


def assign(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    iteration: int,
    iterations: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """Pseudo-labels of one round.

    Args:
        scores: (P, C) of the pool; rows sum to 1.
        iteration: from 0.
        previous: what the round before chose.

    Raises:
        ValueError: no image was chosen, or a score is not a number.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("scores of the pool are not finite: are there NaN in the features?")
    labels = STRATEGIES[settings.kind](
        scores,
        settings,
        capacity=capacity(settings, scores.shape[0], scores.shape[1], iteration, iterations),
        iteration=iteration,
        previous=previous,
    )
    if not len(labels):
        raise ValueError(
            f"no pool image was chosen in iteration {iteration} of {iterations} "
            f"({len(scores)} images, {settings})"
        )
    return labels


def spread(labels: PseudoLabels, classes: Tensor | None, num_classes: int) -> PseudoLabels:
    """Labels among some classes (TRZSL) as labels among all; None: they are among all."""
    if classes is None:
        return labels
    targets = labels.targets.new_zeros(len(labels), num_classes)
    targets[:, classes] = labels.targets
    return PseudoLabels(labels.indices, targets, classes[labels.labels])


def capacity(
    settings: PseudoLabelSettings, images: int, classes: int, iteration: int, iterations: int
) -> int:
    """Images per class in this round: k, or a share that grows until the pool is covered.

    Source: GRIP (arXiv:2306.01669), K_t = floor(t * floor(N / T) / C).

    >>> [capacity(PseudoLabelSettings(growth="growing"), 2040, 102, t, 10) for t in (0, 1, 9)]
    [2, 4, 20]
    """
    if settings.growth == "fixed":
        return settings.k
    return max(1, (iteration + 1) * (images // iterations) // classes)
