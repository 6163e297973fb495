"""Losses of pseudo-labelled and labelled images; `air_core.training` adds them up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from air_core.settings.components import LOSSES

# B images of a step, C classes, M selected pool images.


@LOSSES.add("cc", summary="mass of the set")
def candidate_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of `-log sum_c y_c softmax(z)_c`; cross-entropy where y is one-hot.

    Source: CPL's `cc` (arXiv:2406.10502), by logsumexp so that small scores do not underflow.

    Args:
        logits: (B, C).
        targets: (B, C), each row with a value above 0.
    """
    return -(logits.log_softmax(dim=-1) + targets.log()).logsumexp(dim=-1).mean()


@LOSSES.add("ce", summary="soft cross-entropy")
@LOSSES.add("rc", summary="ce, re-weighted")
def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of `-sum_c y_c log softmax(z)_c`.

    Source: CPL's `ce`, and its `rc` (re-weighted, arXiv:2007.08929), where y is the confidence
    in each candidate, computed again after each pass.
    """
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def only(logits: Tensor, classes: Tensor | slice) -> Tensor:
    """Logits (B, C) with all other classes removed from the softmax.

    Source: CoOp and VPT in GRIP's repository, among seen classes (docs/method.md, step 5).
    """
    kept = torch.full_like(logits, -math.inf)
    kept[:, classes] = logits[:, classes]
    return kept


def confidence(logits: Tensor, candidates: Tensor) -> Tensor:
    """Scores (M, C) within the candidate set of each image; rows sum to 1.

    Args:
        candidates: (M, C), above 0 for candidates.
    """
    return logits.masked_fill(candidates <= 0, -math.inf).softmax(dim=-1)
