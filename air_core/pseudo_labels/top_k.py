"""The K most confident images of each class (FPL, IFPL, GRIP: arXiv:2306.01669).

The reference fills its leader boards in file order, and an image may enter several. Here every
image goes to one class by deferred acceptance, which does not depend on the order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from air_core.specs import PseudoLabelSettings
from air_core.types import PseudoLabels

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
    labels = balanced_choice(scores, torch.full((scores.shape[1],), capacity))
    indices = (labels >= 0).nonzero().flatten()
    targets = one_hot(labels[indices], scores.shape[1]).to(scores.dtype)
    return PseudoLabels(indices=indices, targets=targets, labels=labels[indices])


def balanced_choice(scores: Tensor, capacity: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Deferred acceptance: images propose to classes by score, a class keeps its best.

    Ties go to the earlier image.

    Args:
        scores: (P, C).
        capacity: (C,) places of each class.
        allowed: (P, C) bool, classes that an image may propose to; None: all.

    Returns:
        (P,) the class that took each image, -1 where none did.
    """
    images, classes = scores.shape
    masked = scores if allowed is None else scores.masked_fill(~allowed, -1.0)
    wishes = masked.argsort(dim=-1, descending=True, stable=True)  # (P, C)
    options = (
        torch.full((images,), classes) if allowed is None else allowed.sum(dim=-1)
    )  # wishes beyond this are not allowed
    turn = torch.zeros(images, dtype=torch.long)
    while True:
        active = (turn < options).nonzero().flatten()
        choice = wishes[active, turn[active]]
        strength = scores[active, choice]
        # Order by class, within a class by strength; a rank beyond the capacity is turned away.
        order = strength.argsort(descending=True, stable=True)
        order = order[choice[order].argsort(stable=True)]
        sizes = choice.bincount(minlength=classes)
        first = sizes.cumsum(0) - sizes
        rank = torch.arange(len(order)) - first[choice[order]]
        rejected = active[order[rank >= capacity[choice[order]]]]
        if not len(rejected):
            taken = torch.full((images,), -1)
            taken[active] = choice
            return taken
        turn[rejected] += 1
