"""Validates `bundle.json` and the arrays of a bundle, which can come from an untrusted source.

`SETTINGS` and `ARRAYS` list what is allowed. Each check raises a ValueError with the problem;
`manifest` adds the path of the bundle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from air_core.datasets.dataset import is_template
from air_core.printable import UNPRINTABLE, printable
from air_core.specs import ClipPrecision, FusionSpace

TEXT, PROMPT, FUSED = (f"{name}.safetensors" for name in ("text_features", "prompt", "fused"))
CLASSIFIERS = ("text", "auxiliary", "fused")
MODALITIES = ("text", "visual")
PRECISIONS = get_args(ClipPrecision)
SPACES = get_args(FusionSpace)
SHA256 = re.compile("[0-9a-f]{64}")
UNIT = 1e-3  # largest deviation of the length of a class vector from 1

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # by file, then by name


def check_contents(content: Mapping[str, Any], arrays: Arrays) -> None:
    """Check that settings and arrays are complete, of the right types, and consistent.

    Args:
        content: that of bundle.json in the current format; format and digests are not checked.
        arrays: of the safetensors files.

    Raises:
        ValueError: they are not; the message has the first problem.
    """
    for path, allowed, fits in SETTINGS:
        value: Any = content
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if not fits(value):
            shown = printable(repr(value))
            raise ValueError(f"its {path} is {shown[:SHOWN]}; allowed: {allowed}")
    _check_unseen(content.get("unseen", ""), len(content["classnames"]))
    _check_files(content, arrays)
    _check_arrays(content, arrays)
    _check_classifiers(content, arrays)


def check_digests(digests: Any, where: str) -> None:
    """Check that a value maps file names to SHA-256 digests.

    Raises:
        ValueError: it does not.
    """
    if not _is_digests(digests):
        raise ValueError(f"its {where} is not a dict of file names and SHA-256 digests")


# ---------------------------------------------------------------- bundle.json

SHOWN = 80  # characters of a wrong value in a message


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not UNPRINTABLE.search(value)


def _is_classnames(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(map(_is_text, value))
        and len(set(value)) == len(value)
    )


def _is_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(digest, str) and SHA256.fullmatch(digest) for digest in value.values()
    )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(number) in (int, float) and math.isfinite(number) for number in value.values()
    )


def _is_temperatures(value: Any) -> bool:
    return _is_numbers(value) and all(
        name in CLASSIFIERS and number > 0 for name, number in value.items()
    )


def _is_one_of(allowed: Sequence[str]) -> tuple[str, Callable[[Any], bool]]:
    return ", ".join(allowed), lambda value: isinstance(value, str) and value in allowed


NONE = type(None)
# Path in bundle.json, what is allowed, and whether a value is.
SETTINGS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "classnames",
        "different texts that are not empty, without control characters",
        _is_classnames,
    ),
    (
        "template",
        "a text with {} once, for the class name",
        lambda value: isinstance(value, str) and is_template(value),
    ),
    ("modality", *_is_one_of(MODALITIES)),
    ("prompt", "a dict or null", _is(dict, NONE)),
    ("classifier", *_is_one_of(CLASSIFIERS)),
    ("space", *_is_one_of(SPACES)),
    ("temperatures", "positive numbers by classifier", _is_temperatures),
    ("backbone", "a dict", _is(dict)),
    ("backbone.files", "file names with SHA-256 digests", _is_digests),
    ("backbone.settings", "a dict", _is(dict)),
    ("backbone.open_clip", "a dict", _is(dict)),
    ("backbone.precision", *_is_one_of(PRECISIONS)),
    ("backbone.name", "a text or null", _is(str, NONE)),
    ("metrics", "finite numbers by name", _is_numbers),
    ("lineage", "a dict", _is(dict)),
)


def _check_unseen(unseen: Any, classes: int) -> None:
    if unseen is None:
        return
    fits = isinstance(unseen, list) and all(type(c) is int and 0 <= c < classes for c in unseen)
    if not fits or not 0 < len(set(unseen)) == len(unseen) < classes:
        raise ValueError("its unseen is neither null nor a list of some of its classes")


# ---------------------------------------------------------------- arrays


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


def _check_files(content: Mapping[str, Any], arrays: Arrays) -> None:
    prompt = content.get("prompt") is not None
    if PROMPT in arrays and not prompt:
        raise ValueError(f"it has no prompt, but contains {PROMPT}")
    for name in (TEXT, *([PROMPT] if prompt else [])):
        if name not in arrays:
            raise ValueError(f"{name} is missing")
    for name, of in arrays.items():
        if set(of) not in COMPLETE[name]:
            allowed = " or ".join(", ".join(sorted(names)) for names in COMPLETE[name])
            raise ValueError(f"{name} must contain exactly {allowed}")


def _check_arrays(content: Mapping[str, Any], arrays: Arrays) -> None:
    classes, unseen = len(content["classnames"]), content["unseen"]
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


def classifiers(content: Mapping[str, Any], arrays: Arrays) -> tuple[str, ...]:
    """The classifiers of a bundle, as `FusedClassifier.each` has them."""
    fused = arrays.get(FUSED, {})
    auxiliary = content["unseen"] is None and "auxiliary.center" in fused
    return ("text", *(["auxiliary"] if auxiliary else []), *(["fused"] if fused else []))


def _check_classifiers(content: Mapping[str, Any], arrays: Arrays) -> None:
    found = classifiers(content, arrays)
    if content["classifier"] not in found:
        raise ValueError(f"its classifier is {content['classifier']}; it has {', '.join(found)}")
    auxiliary = arrays.get(FUSED, {})
    if "auxiliary.bank" in auxiliary:
        classes = len(content["unseen"] or content["classnames"])
        counts = np.bincount(auxiliary["auxiliary.labels"], minlength=classes)
        if counts.min() < max(1, int(auxiliary["auxiliary.nearest"])):
            raise ValueError("auxiliary.labels have fewer images of a class than are compared")
