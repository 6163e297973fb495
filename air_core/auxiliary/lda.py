"""Linear discriminant analysis as auxiliary classifier."""

from __future__ import annotations

import torch

from air_core.auxiliary.bank import Bank
from air_core.classifiers import LinearClassifier

SHRINKAGE = 0.2  # of the within-class covariance towards a multiple of the identity


def lda(bank: Bank) -> LinearClassifier:
    """Linear discriminant with a shrunk within-class covariance and equal priors.

    Its logits are log-likelihood ratios, so CLIP's temperature does not apply. It is computed in
    float64, since with few images the covariance is close to singular.

    Raises:
        ValueError: no two images of a class differ.
    """
    x = bank.features.double()
    means = bank.means(x)  # (C, D)
    within = x - means[bank.labels]
    width = x.shape[1]
    covariance = within.T @ within / max(1, len(x) - len(means))
    scale = covariance.trace() / width
    if scale < 1e-12:  # of unit features
        raise ValueError(
            "auxiliary.kind lda needs images of a class that differ, but the bank has one image of "
            "each class, or copies of it; use another auxiliary.kind or more images"
        )
    identity = torch.eye(width, dtype=x.dtype)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * scale * identity
    weight = torch.linalg.solve(covariance, means.T).T  # (C, D)
    bias = -0.5 * (weight * means).sum(dim=-1)
    return LinearClassifier(weight.float(), bias.float(), bank.center, unit=False, sharpness=1.0)
