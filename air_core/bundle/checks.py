"""Validates the arrays of a bundle, which can come from an untrusted source; see `ARRAYS`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from air_core.bundle.content import Content

TEXT, PROMPT, FUSED = (f"{name}.safetensors" for name in ("text_features", "prompt", "fused"))
ClassifierName = Literal["text", "auxiliary", "fused"]
CLASSIFIERS: tuple[str, ...] = get_args(ClassifierName)
UNIT = 1e-3  # largest deviation of the length of a class vector from 1

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # by file, then by name


def check_arrays(content: Content, arrays: Arrays) -> None:
    """Check that arrays are complete, of the right types and shapes, and fit the content.

    Raises:
        ValueError: they are not or do not; the message has the first problem.
    """
    _check_files(content, arrays)
    _check_values(content, arrays)
    _check_classifiers(content, arrays)


@dataclass(frozen=True)
class Allowed:
    """What an array may contain."""

    dtype: str
    # One letter a dimension: C classes, U those of pool images, D feature width; any number, the
    # same within a file: N, L, P, W. Several texts: several numbers of dimensions.
    shapes: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf
    below: str = ""  # letter of a number that integers stay below

    def __str__(self) -> str:
        shapes = " or ".join(f"({', '.join(shape)})" for shape in self.shapes)
        limits = f" from {self.low:g} to {self.high:g}" if self.low > -math.inf else ""
        return f"{self.dtype} {shapes}{limits}" + (f" below {self.below}" if self.below else "")


TINY = 1e-30
ARRAYS: dict[str, dict[str, Allowed]] = {
    TEXT: {
        "text_features": Allowed("float32", ("CD",)),
        "logit_scale": Allowed("float32", ("",), TINY),
    },
    PROMPT: {"prompt": Allowed("floats", ("LW", "PLW"))},
    FUSED: {
        "weight": Allowed("float64", ("",), 0, 1),
        "auxiliary.weight": Allowed("float32", ("UD",)),
        "auxiliary.bias": Allowed("float32", ("U",)),
        "auxiliary.unit": Allowed("bool", ("",)),
        "auxiliary.bank": Allowed("float32", ("ND",)),
        "auxiliary.labels": Allowed("integers", ("N",), 0, below="U"),
        "auxiliary.nearest": Allowed("integers", ("",), 0),
        "auxiliary.center": Allowed("float32", ("D",)),
        "auxiliary.sharpness": Allowed("float64", ("",), TINY),
        "mixture.means": Allowed("float32", ("UD",)),
        "mixture.precision": Allowed("float32", ("D",), TINY),
    },
}
KINDS = {"floats": np.floating, "integers": np.signedinteger}
_OF_ALL = ("auxiliary.center", "auxiliary.sharpness")
# The sets of arrays that a file contains.
COMPLETE: dict[str, tuple[set[str], ...]] = {
    TEXT: ({"text_features", "logit_scale"},),
    PROMPT: ({"prompt"},),
    FUSED: (
        {"weight", *_OF_ALL, "auxiliary.weight", "auxiliary.bias", "auxiliary.unit"},
        {"weight", *_OF_ALL, "auxiliary.bank", "auxiliary.labels", "auxiliary.nearest"},
        {"weight", "mixture.means", "mixture.precision"},
    ),
}


def _check_files(content: Content, arrays: Arrays) -> None:
    prompt = content.prompt is not None
    if PROMPT in arrays and not prompt:
        raise ValueError(f"it has no prompt, but contains {PROMPT}")
    for name in (TEXT, *([PROMPT] if prompt else [])):
        if name not in arrays:
            raise ValueError(f"{name} is missing")
    for name, of in arrays.items():
        if set(of) not in COMPLETE[name]:
            allowed = " or ".join(", ".join(sorted(names)) for names in COMPLETE[name])
            raise ValueError(f"{name} must contain exactly {allowed}")


def _check_values(content: Content, arrays: Arrays) -> None:
    classes, unseen = len(content.classnames), content.unseen
    sizes = {"C": classes, "U": len(unseen or range(classes))}
    for file, of in arrays.items():
        for letter in "LNPW":
            sizes.pop(letter, None)
        for name, array in of.items():
            allowed = ARRAYS[file][name]
            if not _fits(array, allowed, sizes):
                found = f"{array.dtype} {array.shape}"
                where = ", ".join(f"{letter} {size}" for letter, size in sorted(sizes.items()))
                raise ValueError(
                    f"{name} of {file} is {found} or has values out of range; allowed: finite "
                    f"{allowed}, with {where}"
                )
            if not array.size:
                raise ValueError(f"{name} of {file} is empty")
    lengths = np.linalg.norm(arrays[TEXT]["text_features"].astype(np.float64), axis=1)  # (C,)
    if (np.abs(lengths - 1) > UNIT).any():
        raise ValueError("text_features have vectors whose length is not 1")


def _fits(array: np.ndarray, allowed: Allowed, sizes: dict[str, int]) -> bool:
    kind = KINDS.get(allowed.dtype)
    if array.dtype != allowed.dtype if kind is None else not np.issubdtype(array.dtype, kind):
        return False
    for shape in allowed.shapes:
        known = [sizes.get(letter, size) for letter, size in zip(shape, array.shape, strict=False)]
        if len(shape) == array.ndim and (*known,) == array.shape:
            sizes |= dict(zip(shape, array.shape, strict=True))
            break
    else:
        return False
    high = sizes[allowed.below] - 1 if allowed.below else allowed.high
    fits = np.isfinite(array) & (array >= allowed.low) & (array <= high)
    return bool(fits.all())


def classifiers(content: Content, arrays: Arrays) -> tuple[str, ...]:
    """The classifiers of a bundle, as `FusedClassifier.each` has them."""
    fused = arrays.get(FUSED, {})
    auxiliary = content.unseen is None and "auxiliary.center" in fused
    return ("text", *(["auxiliary"] if auxiliary else []), *(["fused"] if fused else []))


def _check_classifiers(content: Content, arrays: Arrays) -> None:
    found = classifiers(content, arrays)
    if content.classifier not in found:
        raise ValueError(f"its classifier is {content.classifier}; it has {', '.join(found)}")
    auxiliary = arrays.get(FUSED, {})
    if "auxiliary.bank" in auxiliary:
        classes = len(content.unseen or content.classnames)
        counts = np.bincount(auxiliary["auxiliary.labels"], minlength=classes)
        if counts.min() < max(1, int(auxiliary["auxiliary.nearest"])):
            raise ValueError("auxiliary.labels have fewer images of a class than are compared")
