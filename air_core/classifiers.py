"""Classifiers on frozen CLIP features: text, linear, and text fused with an auxiliary one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_core.backbone import Backbone
from air_core.tools.chunks import by_rows
from air_core.types import Classes, Encoded

# N images, C classes, U unseen classes, D feature width.


class Classifier(Protocol):
    """Gives logits for images."""

    def logits(self, batch: Encoded) -> Tensor:
        """(N, C) before softmax, with the temperature applied."""
        ...


@dataclass(frozen=True)
class LinearClassifier:
    """`sharpness * (x @ weight.T + bias)`, where x is centred and, with `unit`, of unit length."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    center: Tensor  # (D,), subtracted from features
    unit: bool
    sharpness: float

    def logits(self, batch: Encoded) -> Tensor:
        return by_rows(self._logits, batch.features, width=len(self.weight))

    def _logits(self, x: Tensor) -> Tensor:
        x = x - self.center
        if self.unit:
            x = normalize(x, dim=-1)
        return self.sharpness * (x @ self.weight.T + self.bias)


def class_texts(backbone: Backbone, classnames: Sequence[str], template: str) -> Tensor:
    """(C, D) features of one text per class; underscores in names become spaces."""
    return backbone.encode_texts([template.format(name.replace("_", " ")) for name in classnames])


def text_classifier(
    backbone: Backbone, classnames: Sequence[str], template: str
) -> LinearClassifier:
    """p_c of zero-shot CLIP (arXiv:2103.00020): cosine to one text per class, times logit_scale."""
    weight = class_texts(backbone, classnames, template).cpu()
    return LinearClassifier(
        weight=weight,
        bias=torch.zeros(len(weight)),
        center=torch.zeros(weight.shape[1]),
        unit=False,
        sharpness=backbone.logit_scale,
    )


@dataclass(frozen=True)
class CachedClassifier:
    """A frozen classifier that computes the logits of a batch once, since towers are slow."""

    classifier: Classifier
    _logits: dict[int, tuple[Encoded, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, batch: Encoded) -> Tensor:
        """(N, C)"""
        if id(batch) not in self._logits:
            # Keeping the batch prevents another one from getting the same address.
            self._logits[id(batch)] = (batch, self.classifier.logits(batch))
        return self._logits[id(batch)][1]


@dataclass(frozen=True)
class FusedClassifier:
    """A text classifier fused with an auxiliary classifier and, for pool images, with evidence.

    In TRZSL the auxiliary classifier has the unseen classes only. It then redistributes the
    scores that the text classifier gives to these; those of seen classes do not change.
    """

    text: Classifier
    auxiliary: Any  # a Classifier over C or U classes; None: the text classifier alone
    weight: float  # λ / (1 + λ), the share of the auxiliary classifier, in [0, 1]
    space: str  # `probability`: weighted mean of the two; `logit`: weighted geometric mean
    classes: Classes
    evidence: Tensor | None = None  # (P, C) or (P, U), see air_core.evidence; of pool images only
    evidence_weight: float = 0.0

    def pool_scores(self, pool: Encoded) -> Tensor:
        """(N, C), or in TRZSL (N, U) over the classes of pool images; rows sum to 1."""
        return by_rows(self.fused_scores, self.text.logits(pool), pool.features, self.evidence)

    def fused_scores(self, text: Tensor, features: Tensor, q: Tensor | None = None) -> Tensor:
        """p* = (p + λ p̂) / (1 + λ), and (1 - v) p* + v q of images with evidence q.

        The logits of both classifiers are softmaxed first, since their temperatures differ.

        Args:
            text: (N, C) logits.
            features: (N, D) of the same images.
            q: (N, C) or (N, U); NaN where an image was not scored.

        Returns:
            (N, C), or in TRZSL (N, U); rows sum to 1.

        Source: AiR's sum p + λ p̂ (docs/method.md, step 4). Dividing by 1 + λ changes no ranking and
        gives a distribution, which candidate sets need.
        """
        w, v, text = self.weight, self.evidence_weight, self.classes.columns(text)
        if self.auxiliary is None:
            fused = text.softmax(dim=-1)
        else:
            auxiliary: Tensor = self.auxiliary.logits(Encoded(features))
            if self.space == "logit":
                logs = (1 - w) * text.log_softmax(dim=-1) + w * auxiliary.log_softmax(dim=-1)
                fused = logs.softmax(dim=-1)
            else:
                fused = (1 - w) * text.softmax(dim=-1) + w * auxiliary.softmax(dim=-1)
        return fused if q is None else torch.where(q.isfinite(), (1 - v) * fused + v * q, fused)

    def scores(self, batch: Encoded) -> Tensor:
        """(N, C) over all classes; rows sum to 1."""
        return by_rows(self._scores, self.text.logits(batch), batch.features)

    def _scores(self, text: Tensor, features: Tensor) -> Tensor:
        fused, classes = self.fused_scores(text, features), self.classes
        if classes.unseen is None:
            return fused
        scores = text.softmax(dim=-1)
        mass = classes.columns(scores).sum(dim=-1, keepdim=True)
        return scores.index_copy(1, classes.unseen, mass * fused)

    def logits(self, batch: Encoded) -> Tensor:
        """(N, C) logarithms of the scores."""
        return self.scores(batch).log_()

    def each(self, text: Classifier) -> dict[str, Classifier]:
        """The classifiers of new images by name: text, auxiliary and fused.

        Left out are the auxiliary classifier where it has no seen class (TRZSL) or is None, and the
        fused one where it is the text classifier.

        Args:
            text: the text classifier before `transductive` refines it.
        """
        found = {"text": text}
        if self.auxiliary is not None and self.classes.unseen is None:
            found["auxiliary"] = self.auxiliary
        if self.auxiliary is not None or self.text is not text:
            found["fused"] = self
        return found

    def votes(self, text: Classifier, pool: Encoded) -> dict[str, Tensor]:
        """Classes (P,) that text, auxiliary and evidence predict, those that there are.

        They are counted among the classes of the pool; -1 where an image has no evidence.
        """
        logits = text.logits(pool)
        found = {"text": self.classes.columns(logits).argmax(dim=1)}
        if self.auxiliary is not None:
            best = partial(_best, self.auxiliary)
            found["auxiliary"] = by_rows(best, pool.features, width=logits.shape[1])
        if self.evidence is not None:
            found["evidence"] = by_rows(_vote, self.evidence)
        return found


def _best(classifier: Classifier, features: Tensor) -> Tensor:
    return classifier.logits(Encoded(features)).argmax(dim=1)


def _vote(q: Tensor) -> Tensor:
    return q.argmax(dim=1).where(q.isfinite().any(dim=1), -1)


@torch.no_grad()
def fuse(
    text: Classifier,
    auxiliary: Any,
    pool: Encoded,
    classes: Classes,
    weight: float,
    temperature: str,
    space: str = "probability",
) -> FusedClassifier:
    """Fuse a text classifier with an auxiliary classifier.

    `match_confidence` first scales the logits of the auxiliary classifier until both have the same
    confidence: the mean largest score over the pool, which needs no label.
    """
    if auxiliary is not None and temperature == "match_confidence":
        confidence = _confidence(classes.columns(text.logits(pool))).mean().item()
        factor = matching_sharpness(auxiliary.logits(pool), confidence)
        auxiliary = replace(auxiliary, sharpness=auxiliary.sharpness * factor)
    return FusedClassifier(text, auxiliary, weight, space, classes)


def matching_sharpness(logits: Tensor, confidence: float, images: Tensor | None = None) -> float:
    """Find the factor on logits (N, C) at which the mean largest score equals `confidence`.

    The mean grows with the factor, from 1/C at 0, so the search bisects the factor's logarithm.

    Args:
        images: (N,) bool, those of the mean; None: all.
    """

    @cache  # the last steps differ by less than float32 can express
    def mean(factor: float) -> float:
        found = _confidence(logits, factor)
        return (found if images is None else found[images]).mean().item()

    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        if mean(torch.tensor(middle).exp().item()) < confidence:
            low = middle
        else:
            high = middle
    return float(torch.tensor((low + high) / 2).exp())


def _confidence(logits: Tensor, factor: float = 1.0) -> Tensor:
    """(N,) largest scores of logits (N, C) times a factor."""
    return by_rows(lambda z: (z * factor).softmax(dim=-1).amax(dim=-1), logits)
