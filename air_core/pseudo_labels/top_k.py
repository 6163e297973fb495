"""The K most confident images of each class (FPL, IFPL, GRIP: arXiv:2306.01669).

The reference fills one list per class in file order, and an image may enter several. Here each
image is assigned to one class by deferred acceptance, which does not depend on the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.chunks import by_rows
from air_core.specs import PseudoLabelSettings
from air_core.types import PseudoLabels, SparseTargets

# P images, C classes, M of the images.


def top_k(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    capacity: int,
    iteration: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """One-hot targets for at most `capacity` images per class."""
    slots = torch.full((scores.shape[1],), capacity)
    return _selected(scores, balanced_choice(scores, slots))


def predicted(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    capacity: int,
    iteration: int,
    previous: PseudoLabels | None,
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
