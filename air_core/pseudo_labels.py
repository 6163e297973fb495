"""Pseudo-labels: training targets from scores.

A strategy is a pure function of the scores and the round. It reads no true label.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from air_core.settings import PseudoLabelSettings
from air_core.settings.components import STRATEGIES
from air_core.tools.chunks import by_rows, chunks
from air_core.types import ROWS, Classes, PseudoLabels, SparseTargets, sparse

# P images, C classes, M of the images.


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


# ---------------------------------------------------------------- strategies


@STRATEGIES.add("top_k", summary="K most confident images of each class", reads={"growth", "k"})
def top_k(
    scores: Tensor, settings: PseudoLabelSettings, *, capacity: int, **_: Any
) -> PseudoLabels:
    """One-hot targets for at most `capacity` images per class (FPL, IFPL, GRIP: arXiv:2306.01669).

    The reference fills one list per class in file order, and an image may enter several. Here each
    image is assigned to one class, which does not depend on the order.
    """
    slots = torch.full((scores.shape[1],), capacity)
    return _selected(scores, balanced_choice(scores, slots))


@STRATEGIES.add(
    "predicted", summary="the same among images with this best class", reads={"growth", "k"}
)
def predicted(
    scores: Tensor, settings: PseudoLabelSettings, *, capacity: int, **_: Any
) -> PseudoLabels:
    """The same among the images that the scores assign to the class (UPL, arXiv:2204.03649).

    A class that no image is assigned to gets none.
    """
    best = by_rows(lambda scores: scores.argmax(dim=1), scores)
    images = torch.arange(len(scores), device=scores.device)
    return _selected(scores, best.where(_ranks(scores, images, best) < capacity, -1))


def _selected(scores: Tensor, labels: Tensor) -> PseudoLabels:
    """One-hot targets of the images (P,) whose label is not -1."""
    indices = (labels >= 0).nonzero().flatten()
    targets = SparseTargets.one_hot(labels[indices], scores.shape[1], scores.dtype)
    return PseudoLabels(indices=indices, targets=targets, labels=labels[indices])


@STRATEGIES.add("threshold", summary="all images of at least this confidence", reads={"threshold"})
def threshold(scores: Tensor, settings: PseudoLabelSettings, **_: Any) -> PseudoLabels:
    """One-hot targets, not balanced over classes (FixMatch, arXiv:2001.07685).

    At least the most confident image is selected.
    """
    confidence, predictions = scores.max(dim=-1)
    is_selected = confidence >= min(settings.threshold, float(confidence.max()))
    indices = is_selected.nonzero().flatten()
    labels = predictions[indices]
    targets = SparseTargets.one_hot(labels, scores.shape[1], scores.dtype)
    return PseudoLabels(indices=indices, targets=targets, labels=labels)


@STRATEGIES.add(
    "candidates", summary="CPL's sets of classes", reads={"growth", "k", "alpha", "beta", "loss"}
)
def candidates(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    capacity: int,
    iteration: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """Targets are candidate sets; each image takes a slot of one class (CPL, arXiv:2406.10502).

    Targets are 0/1; in the first growing round they are the scores, renormalised on the set.
    Thresholds, order of steps and the rule for under-filled classes follow the paper's repository
    (vanillaer/CPL-ICML2024). Its recursion is vectorised here, and no empty row is divided by.
    """
    allowed = candidate_sets(scores, settings.alpha, settings.beta)
    labels = balanced_choice(scores, _slots(capacity, scores, previous), allowed)
    indices = (labels >= 0).nonzero().flatten()
    is_soft = iteration == 0 and settings.growth == "growing"

    def targets(rows: Tensor) -> Tensor:  # (B, C)
        sets = allowed[rows].to(scores.dtype)
        weighted = sets * scores[rows]
        return weighted / weighted.sum(dim=-1, keepdim=True) if is_soft else sets

    return PseudoLabels(
        indices=indices,
        targets=SparseTargets.of(map(targets, torch.split(indices, ROWS))),
        labels=labels[indices],
    )


def candidate_sets(scores: Tensor, alpha: float, beta: float) -> Tensor:
    """Classes that are plausible among those of an image *and* among the images of the class.

    Args:
        scores: (P, C); rows sum to 1.
        alpha: an image keeps its best classes until their mass exceeds the alpha-quantile of
            confidence over images; the class that exceeds it is kept.
        beta: a class keeps images at or above the beta-quantile of its column.

    Returns:
        (P, C) bool; a row may be empty.
    """
    enough = scores.amax(dim=-1).quantile(alpha)
    least = _column_quantiles(scores, beta)

    def plausible(scores: Tensor) -> Tensor:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        # Mass of the classes ranked before. A difference of sums would not be exactly `enough`.
        before = pad(ordered.cumsum(dim=-1)[:, :-1], (1, 0))
        within_image = torch.empty_like(order, dtype=torch.bool).scatter_(
            1, order, before <= enough
        )
        return within_image & (scores >= least)

    return by_rows(plausible, scores)


def _column_quantiles(scores: Tensor, q: float) -> Tensor:
    """`scores.quantile(q, dim=0)` (C,), which sorts, by selection and in chunks of columns."""
    images, classes = scores.shape
    rank = torch.tensor(q, dtype=scores.dtype, device=scores.device) * (images - 1)
    low, high = int(rank.floor()), int(rank.ceil())
    below, above = scores.new_empty(2, classes)
    for columns in chunks(classes, images):
        part = scores[:, columns].T.contiguous()
        below[columns] = part.kthvalue(low + 1).values
        above[columns] = part.kthvalue(high + 1).values
    quantiles: Tensor = below.lerp(above, rank - low)
    return quantiles


def _slots(capacity: int, scores: Tensor, previous: PseudoLabels | None) -> Tensor:
    """(C,) slots of each class; a class that the round before did not fill stays limited."""
    classes = scores.shape[1]
    if previous is None:
        return torch.full((classes,), capacity, device=scores.device)
    filled = previous.labels.to(scores.device).bincount(minlength=classes)
    return (filled + (capacity - filled.max())).clamp(min=0)


# ---------------------------------------------------------------- the assignment to classes


def balanced_choice(scores: Tensor, capacity: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Assign images to classes by deferred acceptance, in which images propose by score.

    Between equal scores the earlier image has priority, and an image prefers the earlier class.

    Args:
        scores: (P, C).
        capacity: (C,) slots of each class.
        allowed: (P, C) bool, the classes that an image may propose to; None: all.

    Returns:
        (P,) the class that each image is assigned to, -1 where there is none.
    """
    images, classes = scores.shape
    capacity = capacity.to(scores.device)
    # The weakest image that a full class holds; one that is not stronger need not propose.
    least = torch.where(capacity > 0, -torch.inf, torch.inf).to(scores.dtype)  # (C,) its score
    last = torch.full_like(capacity, images)  # (C,) its position

    def best(at: Tensor) -> Tensor:
        """The class that images propose to next, -1 where there is none."""
        own = scores[at]
        open_to = (own > least) | ((own == least) & (at[:, None] < last))
        if allowed is not None:
            open_to &= allowed[at]
        found = own.masked_fill_(~open_to, -torch.inf).max(dim=1)
        return found.indices.where(found.values > -torch.inf, -1)

    choice = torch.full((images,), -1, device=scores.device)
    proposing = torch.arange(images, device=scores.device)
    while len(proposing):
        choice[proposing] = by_rows(best, proposing, width=classes)
        is_overfull = (choice + 1).bincount(minlength=classes + 1)[1:] > capacity
        held = ((choice >= 0) & is_overfull[choice]).nonzero().flatten()
        classes_held = choice[held]
        rank = _ranks(scores, held, classes_held)
        weakest = rank == capacity[classes_held] - 1
        last[classes_held[weakest]] = held[weakest]
        least[classes_held[weakest]] = scores[held[weakest], classes_held[weakest]]
        proposing = held[rank >= capacity[classes_held]]
        choice[proposing] = -1
    return choice


def _ranks(scores: Tensor, images: Tensor, choice: Tensor) -> Tensor:
    """(M,) rank by score of images (M,) among those with the same choice (M,)."""
    order = scores[images, choice].argsort(descending=True, stable=True)
    order = order[choice[order].argsort(stable=True)]
    sizes = choice.bincount(minlength=scores.shape[1])
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[choice[order]]
    return rank
