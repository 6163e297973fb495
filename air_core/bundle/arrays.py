"""A fused classifier as named arrays, in the record of a trial and in a bundle.

    weight                                    () share of the auxiliary classifier
    auxiliary.weight bias center unit         of a linear auxiliary classifier, with its sharpness
    auxiliary.bank labels center nearest      of one that compares images, with its sharpness
    mixture.means precision                   of `transduction: gmm`

The text classifier is not among them: it follows from the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from air_core.auxiliary import BankClassifier
from air_core.classifiers import Classifier, FusedClassifier, LinearClassifier
from air_core.transduction import MixtureClassifier
from air_core.types import Classes

AUXILIARY, MIXTURE = "auxiliary.", "mixture."


def fused_arrays(fused: FusedClassifier) -> dict[str, Tensor]:
    """The arrays of a fused classifier, without those of text and evidence."""
    arrays = {"weight": _array(fused.weight)}
    if fused.auxiliary is not None:
        names = [field.name for field in fields(fused.auxiliary)]
        arrays |= {AUXILIARY + name: _array(getattr(fused.auxiliary, name)) for name in names}
    if isinstance(fused.text, MixtureClassifier):
        arrays |= {MIXTURE + name: getattr(fused.text, name) for name in ("means", "precision")}
    return arrays


def fused_classifier(
    arrays: Mapping[str, Tensor], text: Classifier, space: str, classes: Classes
) -> FusedClassifier:
    """The classifier of `fused_arrays`, bit for bit.

    Args:
        text: the text classifier, without the mixture.
        space, classes: as of `FusedClassifier`.
    """
    auxiliary, mixture = _below(AUXILIARY, arrays), _below(MIXTURE, arrays)
    if mixture:
        text = MixtureClassifier(text, classes=classes, **mixture)
    kind: Any = BankClassifier if "bank" in auxiliary else LinearClassifier
    weight = float(arrays["weight"])
    return FusedClassifier(text, kind(**auxiliary) if auxiliary else None, weight, space, classes)


def _array(value: Tensor | float | bool) -> Tensor:
    dtype = torch.float64 if isinstance(value, float) else None
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)


def _below(prefix: str, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): array if array.ndim else array.item()
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
