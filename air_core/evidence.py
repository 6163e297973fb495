"""Class probabilities of pool images from the denoising errors of a diffusion model.

`air_core.diffusion.denoising` computes the errors. docs/method.md, step 4, has the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.classifiers import matching_sharpness
from air_core.tools.chunks import by_rows, chunks

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
    q = mean_scores(errors)
    scored = by_rows(lambda part: part.isfinite().any(dim=1), q)
    sharpness = matching_sharpness(q, confidence, scored)
    for rows in chunks(*q.shape):  # without a finite score, the softmax is NaN
        q[rows] = (q[rows] * sharpness).softmax(dim=1)
    return balanced(q) if balance == "sinkhorn" else q


def mean_scores(errors: Tensor) -> Tensor:
    """(draws, P, C) errors -> (P, C) scores, at most 0; -inf where a class was left out.

    A class that pruning left out after some draws is out: it had a larger error than the others.
    """

    def scores(errors: Tensor) -> Tensor:  # (P, draws, C)
        complete = errors.isfinite().all(dim=1)
        means = errors.nan_to_num(torch.inf).mean(dim=1).masked_fill(~complete, torch.inf)
        return torch.where(complete, means.amin(dim=1, keepdim=True) - means, -torch.inf)

    return by_rows(scores, errors.transpose(0, 1), width=len(errors) * errors.shape[2])


def balanced(q: Tensor) -> Tensor:
    """Rescale probabilities (P, C), in place, until all classes have the same share of the images.

    Sinkhorn's iterations (arXiv:1306.0895); no label is read. Rows of NaN do not count.

    >>> balanced(torch.tensor([[0.9, 0.1], [0.6, 0.4]])).sum(dim=0)
    tensor([1., 1.])
    """
    images = (~q[:, 0].isnan()).nonzero().flatten()
    parts = [images[rows] for rows in chunks(len(images), q.shape[1])]
    share = len(images) / q.shape[1]
    # A factor of each class and image: float64 scores need twice the memory of q.
    factors = torch.ones(q.shape[1], dtype=torch.float64, device=q.device)  # of classes
    sums = torch.stack([q[part].double().sum(dim=0) for part in parts]).sum(dim=0)
    for _ in range(SINKHORN_STEPS):
        balance = share / (factors * sums).clamp(min=1e-12)
        factors = factors * balance.where(sums > 0, 1.0)
        sums = torch.zeros_like(sums)
        for part in parts:
            scores = q[part].double()
            sums += (1 / (scores @ factors)) @ scores
    for part in parts:
        scores = q[part].double() * factors
        q[part] = (scores / scores.sum(dim=1, keepdim=True)).float()
    return q
