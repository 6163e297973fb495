"""Select each image whose largest score reaches a threshold (FixMatch, arXiv:2001.07685)."""

from __future__ import annotations

from torch import Tensor

from air_core.specs import PseudoLabelSettings
from air_core.types import PseudoLabels, SparseTargets


def threshold(
    scores: Tensor,
    settings: PseudoLabelSettings,
    *,
    capacity: int,
    iteration: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """One-hot targets, not balanced over classes. At least the most confident image is selected."""
    confidence, predictions = scores.max(dim=-1)
    is_selected = confidence >= min(settings.threshold, float(confidence.max()))
    indices = is_selected.nonzero().flatten()
    labels = predictions[indices]
    targets = SparseTargets.one_hot(labels, scores.shape[1], scores.dtype)
    return PseudoLabels(indices=indices, targets=targets, labels=labels)
