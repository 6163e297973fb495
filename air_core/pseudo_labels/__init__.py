"""Pseudo-labels: training targets from scores.

A strategy is a pure function of the scores and the round. It reads no true label.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from air_core.components import STRATEGIES
from air_core.specs import PseudoLabelSettings
from air_core.types import Classes, PseudoLabels, SparseTargets, sparse


class Strategy(Protocol):
    """Selects pool images and their targets."""

    def __call__(
        self,
        scores: Tensor,
        settings: PseudoLabelSettings,
        *,
        capacity: int,
        iteration: int,
        previous: PseudoLabels | None,
    ) -> PseudoLabels:
        """Select at most `capacity` images per class by the scores (P, C) of the pool.

        Targets are a tensor (M, C), or SparseTargets where M * C numbers are too many.
        """
        ...


def assign(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    iteration: int,
    iterations: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """Pseudo-label the pool for one round.

    Args:
        scores: (P, C) of the pool; rows sum to 1.
        iteration: from 0.
        previous: pseudo-labels of the round before.

    Returns:
        Pseudo-labels with SparseTargets.

    Raises:
        ValueError: no image was selected, a score is not finite, or targets are not (M, C).
    """
    if not scores.sum(dim=-1).isfinite().all():  # isfinite of (P, C) copies it
        raise ValueError("scores of the pool are not finite: are there NaN in the features?")
    strategy: Strategy = STRATEGIES.load(settings.kind)
    labels = strategy(
        scores,
        STRATEGIES.settings_of(settings.kind, settings),
        capacity=capacity(settings, scores.shape[0], scores.shape[1], iteration, iterations),
        iteration=iteration,
        previous=previous,
    )
    if not len(labels):
        raise ValueError(
            f"no pool image was selected in iteration {iteration} of {iterations} "
            f"({len(scores)} images, {settings})"
        )
    return replace(labels, targets=_compact(labels, scores.shape[1]))


def _compact(labels: PseudoLabels, num_classes: int) -> SparseTargets:
    targets, shape = labels.targets, (len(labels), num_classes)
    if isinstance(targets, Tensor) and targets.shape != shape:
        raise ValueError(
            f"`targets` must be (M, C), one row for each selected image: {shape}, but they are "
            f"{tuple(targets.shape)}"
        )
    return sparse(targets)


def spread(labels: PseudoLabels, classes: Classes) -> PseudoLabels:
    """Pseudo-labels of classes of the pool, over all classes."""
    targets = sparse(labels.targets).among_all(classes)
    return PseudoLabels(labels.indices, targets, classes.numbers(labels.labels))


def capacity(
    settings: PseudoLabelSettings, images: int, classes: int, iteration: int, iterations: int
) -> int:
    """K_t, the images per class in this round: k, or a number that grows until all are selected.

    Source: GRIP (arXiv:2306.01669), K_t = floor(t * floor(N / T) / C).

    >>> [capacity(PseudoLabelSettings(growth="growing"), 2040, 102, t, 10) for t in (0, 1, 9)]
    [2, 4, 20]
    """
    if settings.growth == "fixed":
        return settings.k
    return max(1, (iteration + 1) * (images // iterations) // classes)
