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
from air_core.types import Encoded, Labelled

__all__ = [
    "AuxiliaryClassifier",
    "BankClassifier",
    "auxiliary_classifier",
    "high_fidelity",
]

# N images, C classes, D feature width.


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
    pool: Encoded,
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
        synthetic_mean = synthetic.images.features.mean(dim=0) if settings.center else mean
        parts.append((synthetic.images.features - synthetic_mean, synthetic.labels))
    if real is not None and len(real):
        parts.append((real.images.features - mean, real.labels))
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
