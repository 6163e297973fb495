"""The K most confident images of each class (FPL, IFPL, GRIP: arXiv:2306.01669).

The reference fills one list per class in file order, and an image may enter several. Here each
image is assigned to one class by deferred acceptance, which does not depend on the order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from air_core.specs import PseudoLabelSettings
from air_core.types import PseudoLabels, SparseTargets

# P images, C classes.


def top_k(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    capacity: int,
    iteration: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """One-hot targets for at most `capacity` images per class."""
    return _selected(scores, capacity)


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
    best = one_hot(scores.argmax(dim=1), scores.shape[1]).bool()
    return _selected(scores, capacity, allowed=best)


def _selected(scores: Tensor, capacity: int, allowed: Tensor | None = None) -> PseudoLabels:
    labels = balanced_choice(scores, torch.full((scores.shape[1],), capacity), allowed)
    indices = (labels >= 0).nonzero().flatten()
    targets = SparseTargets.one_hot(labels[indices], scores.shape[1], scores.dtype)
    return PseudoLabels(indices=indices, targets=targets, labels=labels[indices])


def balanced_choice(scores: Tensor, capacity: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Assign images to classes by deferred acceptance, in which images propose by score.

    Between equal scores the earlier image has priority.

    Args:
        scores: (P, C).
        capacity: (C,) slots of each class.
        allowed: (P, C) bool, the classes that an image may propose to; None: all.

    Returns:
        (P,) the class that each image is assigned to, -1 where there is none.
    """
    images, classes = scores.shape
    masked = scores if allowed is None else scores.masked_fill(~allowed, -1.0)
    preferences = masked.argsort(dim=-1, descending=True, stable=True)  # (P, C)
    options = (
        torch.full((images,), classes) if allowed is None else allowed.sum(dim=-1)
    )  # (P,) number of allowed preferences
    turn = torch.zeros(images, dtype=torch.long)
    while True:
        active = (turn < options).nonzero().flatten()
        choice = preferences[active, turn[active]]
        strength = scores[active, choice]
        # Order by class, within a class by score; ranks beyond the capacity are rejected.
        order = strength.argsort(descending=True, stable=True)
        order = order[choice[order].argsort(stable=True)]
        sizes = choice.bincount(minlength=classes)
        first = sizes.cumsum(0) - sizes
        rank = torch.arange(len(order)) - first[choice[order]]
        rejected = active[order[rank >= capacity[choice[order]]]]
        if not len(rejected):
            assignment = torch.full((images,), -1)
            assignment[active] = choice
            return assignment
        turn[rejected] += 1
