"""Selections of synthetic images for the auxiliary classifier.

Source: docs/method.md, step 3 (class_mean is the inferred rule; argmax is DISEF's). Each selects of
a bank, images with the class that each was drawn for; `text` (C, D) are unit text features of the
classes, `real` pool images with their pseudo-label.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_core.specs import FidelitySettings
from air_core.types import Labelled

# N images, C classes, D feature width.


def class_mean(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    return _nearest(bank, settings, lambda features, c: _mean(features))


def text(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    return _nearest(bank, settings, lambda features, c: text[c])


def real_mean(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    """A class without pseudo-labelled image: its own mean."""

    def target(features: Tensor, c: int) -> Tensor:
        if real is None or not bool((real.labels == c).any()):
            return _mean(features)
        return _mean(real.images.features[real.labels == c])

    return _nearest(bank, settings, target)


def argmax(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    """Images whose class CLIP recognises; each class keeps at least the best one."""

    def recognised(features: Tensor, c: int) -> Tensor:
        right = (features @ text.T).argmax(dim=-1) == c
        right[(features @ text[c]).argmax()] = True
        return right.nonzero().flatten()

    return _of_each_class(bank, recognised)


def random(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    # The images of a class have independent noise, so the first ones are a random sample.
    return _of_each_class(bank, lambda features, c: torch.arange(len(features))[: settings.keep])


def none(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    return bank


def _mean(features: Tensor) -> Tensor:  # (N, D) -> (D,)
    return normalize(features.mean(dim=0), dim=-1)


def _nearest(
    bank: Labelled, settings: FidelitySettings, target: Callable[[Tensor, int], Tensor]
) -> Labelled:
    """The images of each class with the largest cosine to the target (D,) of the class."""

    def best(features: Tensor, c: int) -> Tensor:
        order = (features @ target(features, c)).argsort(descending=True, stable=True)
        return order[: settings.keep].sort().values

    return _of_each_class(bank, best)


def _of_each_class(bank: Labelled, choose: Callable[[Tensor, int], Tensor]) -> Labelled:
    """The images whose indices `choose` gives for the features (N, D) of a class."""
    kept = []
    for c in sorted(set(bank.labels.tolist())):
        members = (bank.labels == c).nonzero().flatten()
        kept.append(members[choose(bank.images.features[members], c)])
    return bank[torch.cat(kept)]
