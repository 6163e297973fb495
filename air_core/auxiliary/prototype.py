"""Class means, the auxiliary classifier of AiR (arXiv:2504.11930)."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from air_core.auxiliary.bank import Bank
from air_core.classifiers import LinearClassifier


def prototype(bank: Bank) -> LinearClassifier:
    """Cosine to the unit mean of each class (nearest mean)."""
    weight = normalize(bank.means(bank.unit), dim=-1)
    bias = torch.zeros(len(weight))
    return LinearClassifier(weight, bias, bank.center, unit=True, sharpness=bank.sharpness)
