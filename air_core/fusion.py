"""Weights of the text classifier, the auxiliary classifier and the evidence in their average.

`air_core.method.fused` applies them. docs/method.md, step 4, has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from air_core.classifiers import FusedClassifier
from air_core.specs import TrialSpec
from air_core.types import Batch

# V classifiers, P pool images, C classes of the pool (in TRZSL the unseen ones).

EM_STEPS = 100


def fusion_weights(
    spec: TrialSpec, classifier: FusedClassifier, pool: Batch, progress: float
) -> tuple[float, float]:
    """The share w of the auxiliary classifier in p*, and the share v of the evidence in the pool's
    scores (1 - v) p* + v q.

    Args:
        classifier: text, auxiliary and evidence; its weights are not read.
        progress: 0 in the first round, 1 in the last.
    """
    if spec.fusion.weights == "fixed":
        w, v = spec.fusion_weight, spec.evidence.weight
        if spec.fusion.schedule == "annealed":
            w *= 1 - progress
        if spec.evidence.schedule == "annealed":
            v *= 1 - progress
        return w, v
    votes, classes = classifier.votes(classifier.text, pool), 0
    if classifier.evidence is not None:
        scored, classes = votes["evidence"] >= 0, classifier.evidence.shape[1]
        votes = {name: predicted[scored] for name, predicted in votes.items()}
    shares = iter(agreement_weights([*votes.values()], classes))
    text = next(shares)
    auxiliary = 0.0 if classifier.auxiliary is None else next(shares)
    evidence = 0.0 if classifier.evidence is None else next(shares)
    return auxiliary / max(text + auxiliary, 1e-12), evidence


def agreement_weights(predictions: Sequence[Tensor], classes: int) -> list[float]:
    """Weigh classifiers by the agreement of their predictions; no label is read.

    EM of Dawid and Skene (1979) with one accuracy a per classifier, since a matrix of confusions
    per classifier fits noise where a class has few images. The model: an image has a hidden class,
    which each classifier predicts with probability a, and any other class with (1 - a) / (C - 1),
    independently of the other classifiers. Start: the mean of the predictions. The share of a
    classifier is proportional to log(a (C - 1) / (1 - a)), the weight of its vote in the most
    accurate majority (Nitzan and Paroush, 1982), and 0 for one that is no better than chance.

    Two classifiers get equal shares, since their agreement does not tell which of them is better.

    Args:
        predictions: V classifiers, (P,) each.
        classes: C.

    Returns:
        V shares; their sum is 1.

    >>> votes = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1], [2, 0, 2, 2]])
    >>> first, second, third = agreement_weights(list(votes), 3)
    >>> first > third
    True
    """
    count = len(predictions)
    if count < 3:
        return [1 / count] * count
    votes = torch.stack(list(predictions))  # (V, P)
    same = (votes[:, None] == votes).double()  # (V, V, P)
    together = same.sum(dim=0)  # (V, P) number of votes for the class of each vote
    posterior = together / count  # (V, P) of the class of each vote
    for _ in range(EM_STEPS):
        # One image right and one wrong are added, so that no weight is infinite.
        accuracy = (posterior.sum(dim=1) + 1) / (votes.shape[1] + 2)
        weights = (accuracy * (classes - 1) / (1 - accuracy)).log().clamp(min=0)
        odds = torch.einsum("u,uvp->vp", weights, same).exp()  # against a class without vote
        without_vote = classes - (1 / together).sum(dim=0)
        posterior = odds / ((odds / together).sum(dim=0) + without_vote)
    if not weights.any():
        return [1 / count] * count
    return [float(share) for share in weights / weights.sum()]
