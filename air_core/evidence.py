"""Class probabilities of pool images from the denoising errors of a diffusion model.

`air_core.diffusion.evidence` computes the errors. docs/method.md, step 4, has the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.classifiers import matching_sharpness

# P pool images, C classes of the pool (in TRZSL the unseen ones).

SINKHORN_STEPS = 100


def evidence_probabilities(errors: Tensor, confidence: float, balance: str = "none") -> Tensor:
    """Probabilities q of the classes of each image.

    The score of a class is minus its mean error, measured from that of the best class in the same
    draws, since errors of other time steps cannot be compared. A softmax turns scores into
    probabilities; its sharpness is such that the largest probability is `confidence` on average.

    Args:
        errors: (draws, P, C); NaN where a class was not computed, for whole images where they were
            not scored.
        confidence: in (1 / C, 1).
        balance: `sinkhorn` gives each class the same share of the scored images.

    Returns:
        (P, C) float32; 0 for a class that was left out; rows of images without score are NaN.
    """
    scores = mean_scores(errors)
    scored = scores.isfinite().any(dim=1)
    logits = scores[scored]
    q = torch.full_like(scores, torch.nan)
    q[scored] = (logits * matching_sharpness(logits, confidence)).softmax(dim=1)
    if balance == "sinkhorn":
        q[scored] = balanced(q[scored])
    return q


def mean_scores(errors: Tensor) -> Tensor:
    """(draws, P, C) errors -> (P, C) scores, at most 0; -inf where a class was left out.

    A class that pruning left out after some draws is out: it had a larger error than the others.
    """
    complete = errors.isfinite().all(dim=0)  # (P, C)
    means = errors.nan_to_num(torch.inf).mean(dim=0).masked_fill(~complete, torch.inf)
    best = means.amin(dim=1, keepdim=True)
    return torch.where(complete, best - means, -torch.inf)


def balanced(q: Tensor) -> Tensor:
    """Rescale probabilities (P, C) until all classes have the same share of the images.

    Sinkhorn's iterations (arXiv:1306.0895); no label is read.

    >>> balanced(torch.tensor([[0.9, 0.1], [0.6, 0.4]])).sum(dim=0)
    tensor([1., 1.])
    """
    share = len(q) / q.shape[1]
    q = q.double()
    for _ in range(SINKHORN_STEPS):
        q = q * (share / q.sum(dim=0, keepdim=True).clamp(min=1e-12))
        q = q / q.sum(dim=1, keepdim=True)
    return q.float()
