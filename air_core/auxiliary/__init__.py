"""The auxiliary classifier, which compares images with images of known or pseudo-labelled class.

AiR (arXiv:2504.11930) builds it from synthetic images of known class, a control from
pseudo-labelled real ones. docs/method.md (step 3) says which details are inferred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.auxiliary.bank import AuxiliaryClassifier, Bank, BankClassifier
from air_core.components import AUXILIARIES, FIDELITIES
from air_core.specs import AuxiliarySettings, FidelitySettings
from air_core.types import Batch, Labelled

__all__ = [
    "AuxiliaryClassifier",
    "BankClassifier",
    "auxiliary_classifier",
    "copies",
    "credible",
    "high_fidelity",
    "margins",
]

# N images, C classes, D feature width.

# Least CLIP cosine of two images of a class that are copies: measured, see docs/results_guide.md.
COPY = 0.997

# ---------------------------------------------------------------- selection of images


def credible(synthetic: Labelled, settings: FidelitySettings, logits: Tensor) -> Labelled:
    """Drop copies, and images that the text classifier takes for another class.

    Each class keeps at least its image with the largest margin.

    Args:
        synthetic: images with the class that each was drawn for.
        logits: (N, C) of the text classifier for the same images, over the drawn classes.
    """
    labels, kept = synthetic.labels, torch.ones(len(synthetic), dtype=torch.bool)
    margin = margins(logits, labels)
    if settings.duplicates == "drop":
        kept &= ~copies(synthetic.batch.features, labels)
    if settings.min_margin is not None:
        kept &= margin >= settings.min_margin
    for c in sorted(set(labels.tolist()) - set(labels[kept].tolist())):
        members = (labels == c).nonzero().flatten()
        kept[members[margin[members].argmax()]] = True
    return synthetic[kept.nonzero().flatten()]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) score of an image's own class minus the largest score of another class.

    >>> margins(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    tensor([ 0.0000, -0.4621], dtype=torch.float64)
    """
    scores = logits.double().softmax(dim=-1)
    own = scores.gather(1, labels[:, None]).squeeze(1)
    return own - scores.scatter(1, labels[:, None], -1.0).amax(dim=-1)


def copies(features: Tensor, labels: Tensor, cosine: float = COPY) -> Tensor:
    """(N,) bool: images whose cosine to an earlier image of their class is that of a copy.

    Args:
        features: (N, D) of unit length.
    """
    is_copy = torch.zeros(len(labels), dtype=torch.bool)
    for c in sorted(set(labels.tolist())):
        members = (labels == c).nonzero().flatten()
        near = features[members] @ features[members].T >= cosine
        first = torch.ones(len(members), dtype=torch.bool)
        for i in near.tril(-1).any(dim=1).nonzero().flatten().tolist():
            first[i] = not bool((near[i, :i] & first[:i]).any())
        is_copy[members] = ~first
    return is_copy


def high_fidelity(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    """Select images by `settings.kind`; see `air_core.auxiliary.fidelity`."""
    chosen: Labelled = FIDELITIES.load(settings.kind)(
        bank, FIDELITIES.settings_of(settings.kind, settings), text, real
    )
    return chosen


# ---------------------------------------------------------------- the classifier


def auxiliary_classifier(
    settings: AuxiliarySettings,
    synthetic: Labelled | None,
    real: Labelled | None,
    pool: Batch,
    num_classes: int,
    logit_scale: float,
) -> AuxiliaryClassifier:
    """Build the auxiliary classifier p̂_c.

    With `center`, synthetic and real features each lose their own mean, which removes the shift
    between the two domains.

    Args:
        synthetic: images with the class that each was drawn for.
        real: pool images with their pseudo-label.
        pool: all pool images; real and test images lose their mean.
        num_classes: C; labels are 0 .. C - 1.
        logit_scale: factor on cosines, unless `temperature` is `kappa`.

    Raises:
        ValueError: a class has no image.
    """
    mean = pool.features.mean(dim=0) if settings.center else torch.zeros(pool.features.shape[1])
    parts = []
    if synthetic is not None and len(synthetic):
        synthetic_mean = synthetic.batch.features.mean(dim=0) if settings.center else mean
        parts.append((synthetic.batch.features - synthetic_mean, synthetic.labels))
    if real is not None and len(real):
        parts.append((real.batch.features - mean, real.labels))
    if not parts:
        raise ValueError("the auxiliary classifier has no image at all")
    features = torch.cat([part[0] for part in parts])  # (N, D)
    labels = torch.cat([part[1] for part in parts])
    counts = labels.bincount(minlength=num_classes)
    if not counts.all():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"the auxiliary classifier has no image of class {empty}")
    sharpness = settings.kappa if settings.temperature == "kappa" else logit_scale
    own = AUXILIARIES.settings_of(settings.kind, settings)
    bank = Bank(own, features, labels, counts, mean, sharpness)
    classifier: AuxiliaryClassifier = AUXILIARIES.load(settings.kind)(bank)
    return classifier
