"""Candidate pseudo-labels (CPL, arXiv:2406.10502): an image keeps each plausible class.

Thresholds, order of steps and the rule for under-filled classes follow the paper's repository
(vanillaer/CPL-ICML2024). Its recursion is vectorised here, and no empty row is divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from air_core.chunks import by_rows, chunks
from air_core.pseudo_labels.top_k import balanced_choice
from air_core.specs import PseudoLabelSettings
from air_core.types import ROWS, PseudoLabels, SparseTargets

# P images, C classes.


def candidates(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    capacity: int,
    iteration: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """Targets are candidate sets; each image takes a slot of one class.

    Targets are 0/1; in the first growing round they are the scores, renormalised on the set.
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
    full = torch.full((classes,), capacity, device=scores.device)
    if previous is None:
        return full
    filled = previous.labels.to(scores.device).bincount(minlength=classes)
    return torch.minimum(filled + (capacity - filled.max()), full).clamp(min=0)
