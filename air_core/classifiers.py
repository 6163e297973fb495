"""Classifiers on frozen CLIP features: text, auxiliary (image against image), and the two fused.

The auxiliary classifier is AiR's (arXiv:2504.11930): synthetic images of known class give it, or,
as a control, real pseudo-labelled ones. See docs/method.md for what is known of its form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_core.backbone import Backbone
from air_core.specs import AuxiliarySettings, FidelitySettings
from air_core.types import Batch, Labelled

# N images, C classes, D feature width.

SHRINKAGE = 0.2  # of the within-class covariance towards a multiple of the identity


class Classifier(Protocol):
    """Anything that has logits for images."""

    def logits(self, batch: Batch) -> Tensor:
        """(N, C) before softmax, at the temperature that softmax expects."""
        ...


@dataclass(frozen=True)
class LinearClassifier:
    """`sharpness * (x @ weight.T + bias)`, x centred and, with `unit`, of unit length."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    center: Tensor  # (D,), subtracted from features
    unit: bool
    sharpness: float

    def logits(self, batch: Batch) -> Tensor:
        x = batch.features - self.center
        if self.unit:
            x = normalize(x, dim=-1)
        return self.sharpness * (x @ self.weight.T + self.bias)


def text_classifier(
    backbone: Backbone, classnames: Sequence[str], template: str
) -> LinearClassifier:
    """Zero-shot CLIP: one text per class, cosine, CLIP's own temperature (arXiv:2103.00020)."""
    texts = [template.format(name.replace("_", " ")) for name in classnames]
    weight = backbone.encode_texts(texts).cpu()  # (C, D)
    return LinearClassifier(
        weight=weight,
        bias=torch.zeros(len(weight)),
        center=torch.zeros(weight.shape[1]),
        unit=False,
        sharpness=backbone.logit_scale,
    )


def high_fidelity(bank: Labelled, settings: FidelitySettings) -> Labelled:
    """The `keep` images of each class that are nearest to their class's mean feature.

    Source: docs/method.md, step 3 (the rule is inferred). `none` keeps all.
    """
    if settings.kind == "none":
        return bank
    kept = []
    for c in sorted(set(bank.labels.tolist())):
        members = (bank.labels == c).nonzero().flatten()
        features = bank.batch.features[members]
        nearness = features @ normalize(features.mean(dim=0), dim=-1)
        best = nearness.argsort(descending=True, stable=True)[: settings.keep]
        kept.append(members[best.sort().values])
    index = torch.cat(kept)
    return Labelled(bank.batch[index], bank.labels[index])


def auxiliary_classifier(
    settings: AuxiliarySettings,
    synthetic: Labelled | None,
    real: Labelled | None,
    pool: Batch,
    num_classes: int,
    logit_scale: float,
) -> LinearClassifier:
    """An image-image classifier from images whose class is known or believed.

    Synthetic and real features are centred each on their own mean (with `center`), which removes
    the shift between them.

    Args:
        synthetic: drawn images with the class that they were drawn for.
        real: pool images with their pseudo-label.
        pool: the whole pool; its mean centres real images, at test too.

    Raises:
        ValueError: a class has no image in either.
    """
    mean = pool.features.mean(dim=0) if settings.center else torch.zeros(pool.features.shape[1])
    parts = []
    if synthetic is not None and len(synthetic):
        own = synthetic.batch.features.mean(dim=0) if settings.center else mean
        parts.append((synthetic.batch.features - own, synthetic.labels))
    if real is not None and len(real):
        parts.append((real.batch.features - mean, real.labels))
    features = torch.cat([part[0] for part in parts])  # (N, D)
    labels = torch.cat([part[1] for part in parts])
    counts = labels.bincount(minlength=num_classes)
    if not counts.all():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"the auxiliary classifier has no image of class {empty}")
    form = {"prototype": _prototypes, "lda": _discriminants}[settings.kind]
    return form(features, labels, counts, mean, logit_scale)


def _prototypes(
    features: Tensor, labels: Tensor, counts: Tensor, center: Tensor, sharpness: float
) -> LinearClassifier:
    """Unit class means of unit features, cosine (nearest mean)."""
    weight = normalize(_class_means(normalize(features, dim=-1), labels, counts), dim=-1)
    bias = torch.zeros(len(weight))
    return LinearClassifier(weight, bias, center, unit=True, sharpness=sharpness)


def _discriminants(
    features: Tensor, labels: Tensor, counts: Tensor, center: Tensor, sharpness: float
) -> LinearClassifier:
    """Linear discriminant with a shrunk within-class covariance and equal priors.

    Its logits are log-likelihood ratios already, so CLIP's temperature has no place here; in
    float64, since few images leave the covariance close to singular.
    """
    del sharpness
    x = features.double()
    means = _class_means(x, labels, counts)  # (C, D)
    within = x - means[labels]
    width = x.shape[1]
    covariance = within.T @ within / max(1, len(x) - len(means))
    scale = covariance.trace() / width
    identity = torch.eye(width, dtype=x.dtype)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * scale * identity
    weight = torch.linalg.solve(covariance, means.T).T  # (C, D)
    bias = -0.5 * (weight * means).sum(dim=-1)
    return LinearClassifier(weight.float(), bias.float(), center, unit=False, sharpness=1.0)


def _class_means(features: Tensor, labels: Tensor, counts: Tensor) -> Tensor:  # (C, D)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, features)
    return sums / counts[:, None]


def fused_scores(text_logits: Tensor, auxiliary_logits: Tensor, weight: float) -> Tensor:
    """Blend the text classifier with the auxiliary classifier.

    Each is softmaxed first: their temperatures differ, so logits are not comparable.

    Args:
        text_logits: (N, C).
        auxiliary_logits: (N, C), same images and classes in the same order.
        weight: share of the auxiliary classifier, in [0, 1]; 0 is the text classifier alone.

    Returns:
        Scores (N, C); rows sum to 1.

    Raises:
        ValueError: the shapes differ.

    Source: AiR's sum p + lambda * q (docs/method.md, step 4) with weight = lambda / (1 + lambda);
    dividing changes no ranking and keeps a distribution, which candidate sets need.

    >>> fused_scores(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]]), 0.5)
    tensor([[0.2500, 0.7500]])
    """
    if text_logits.shape != auxiliary_logits.shape:
        raise ValueError(
            f"text logits are {tuple(text_logits.shape)} but auxiliary logits "
            f"{tuple(auxiliary_logits.shape)}: same images, same classes?"
        )
    return (1 - weight) * text_logits.softmax(dim=-1) + weight * auxiliary_logits.softmax(dim=-1)


@dataclass(frozen=True)
class FusedClassifier:
    """A text classifier with an auxiliary one beside it; None: the text classifier alone."""

    text: Classifier
    auxiliary: LinearClassifier | None
    weight: float

    def scores(self, batch: Batch) -> Tensor:
        """(N, C); rows sum to 1."""
        logits = self.text.logits(batch)
        if self.auxiliary is None:
            return logits.softmax(dim=-1)
        return fused_scores(logits, self.auxiliary.logits(batch), self.weight)


@torch.no_grad()
def fuse(
    text: Classifier,
    auxiliary: LinearClassifier | None,
    pool: Batch,
    weight: float,
    temperature: str,
) -> FusedClassifier:
    """Fuse the two; with `match_entropy` the auxiliary is first made as confident as the text.

    Confidence is the mean largest score over the pool, which needs no label.
    """
    if auxiliary is not None and temperature == "match_entropy":
        confidence = text.logits(pool).softmax(dim=-1).amax(dim=-1).mean().item()
        factor = matching_sharpness(auxiliary.logits(pool), confidence)
        auxiliary = replace(auxiliary, sharpness=auxiliary.sharpness * factor)
    return FusedClassifier(text, auxiliary, weight)


def matching_sharpness(logits: Tensor, confidence: float) -> float:
    """The factor on logits (N, C) at which the mean largest score equals `confidence`.

    The mean grows with the factor, from 1/C at 0; found by bisection on its logarithm.
    """
    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        scores = (logits * torch.tensor(middle).exp()).softmax(dim=-1)
        if scores.amax(dim=-1).mean().item() < confidence:
            low = middle
        else:
            high = middle
    return float(torch.tensor((low + high) / 2).exp())
