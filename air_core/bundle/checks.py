"""Validates the arrays of a bundle, which can come from an untrusted source; see `FORMS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from air_core.bundle.content import Content

File = Literal["text_features.safetensors", "prompt.safetensors", "fused.safetensors", "model.onnx"]
TEXT, PROMPT, FUSED, ONNX = get_args(File)
ClassifierName = Literal["text", "auxiliary", "fused"]
CLASSIFIERS: tuple[str, ...] = get_args(ClassifierName)

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # by file, then by name


@dataclass(frozen=True)
class Allowed:
    """What an array may contain: finite numbers of a type and shape."""

    dtype: type[np.generic]
    # One letter a dimension: C classes, U those of pool images, D feature width; L, N, P and W:
    # any number. No dimension is 0.
    shape: str = ""

    def fits(self, array: np.ndarray, sizes: dict[str, int]) -> bool:
        """Whether an array is allowed; `sizes` are those of letters and get those of new ones."""
        if not np.issubdtype(array.dtype, self.dtype) or array.ndim != len(self.shape):
            return False
        for letter, size in zip(self.shape, array.shape, strict=True):
            if size == 0 or sizes.setdefault(letter, size) != size:
                return False
        return bool(np.isfinite(array).all())


_WEIGHT = {"weight": Allowed(np.float64)}
_AUXILIARY = _WEIGHT | {
    "auxiliary.center": Allowed(np.float32, "D"),
    "auxiliary.sharpness": Allowed(np.float64),
}
# The sets of arrays that a file can contain.
FORMS: dict[str, tuple[dict[str, Allowed], ...]] = {
    TEXT: ({"text_features": Allowed(np.float32, "CD"), "logit_scale": Allowed(np.float32)},),
    PROMPT: tuple({"prompt": Allowed(np.floating, shape)} for shape in ("W", "LW", "PLW")),
    FUSED: (
        _AUXILIARY
        | {
            "auxiliary.weight": Allowed(np.float32, "UD"),
            "auxiliary.bias": Allowed(np.float32, "U"),
            "auxiliary.unit": Allowed(np.bool_),
        },
        _AUXILIARY
        | {
            "auxiliary.bank": Allowed(np.float32, "ND"),
            "auxiliary.labels": Allowed(np.signedinteger, "N"),
            "auxiliary.nearest": Allowed(np.signedinteger),
        },
        _WEIGHT
        | {
            "mixture.means": Allowed(np.float32, "UD"),
            "mixture.precision": Allowed(np.float32, "D"),
        },
    ),
}


def classifiers(content: Content, arrays: Arrays) -> tuple[str, ...]:
    """The classifiers of a bundle, as `FusedClassifier.each` has them."""
    fused = arrays.get(FUSED, {})
    auxiliary = content.unseen is None and "auxiliary.center" in fused
    return ("text", *(["auxiliary"] if auxiliary else []), *(["fused"] if fused else []))


def check_arrays(content: Content, arrays: Arrays) -> None:
    """Check that arrays are complete, of the right types and shapes, and fit the content.

    Raises:
        ValueError: they are not or do not; the message has the first problem.
    """
    if arrays.keys() - {FUSED} != {TEXT, *([PROMPT] if content.prompt is not None else [])}:
        raise ValueError("it has other files than an export writes")
    sizes = {"C": len(content.classnames), "U": len(content.unseen or content.classnames)}
    for file, forms in FORMS.items():
        of = arrays.get(file)
        if of is not None and not any(
            form.keys() == of.keys() and all(form[name].fits(of[name], sizes) for name in form)
            for form in forms
        ):
            raise ValueError(f"{file} has other arrays, types, shapes or values than allowed")
    found = classifiers(content, arrays)
    if content.classifier not in found:
        raise ValueError(f"its classifier is {content.classifier}; it has {', '.join(found)}")
