"""Every image whose largest score reaches a threshold, as FixMatch does (arXiv:2001.07685)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from air_core.specs import PseudoLabelSettings
from air_core.types import PseudoLabels


def threshold(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    capacity: int,
    iteration: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """One-hot targets; classes are not balanced, and where no image is sure the surest one is."""
    confidence, guess = scores.max(dim=-1)
    sure = confidence >= min(settings.threshold, float(confidence.max()))
    indices = sure.nonzero().flatten()
    targets = one_hot(guess[indices], scores.shape[1]).to(scores.dtype)
    return PseudoLabels(indices=indices, targets=targets, labels=guess[indices].to(torch.int64))
