"""Validates `bundle.json` and the arrays of a bundle, which can come from an untrusted source.

Each check raises a ValueError with the problem; `manifest` adds the path of the bundle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from air_core.datasets.dataset import is_template
from air_core.printable import UNPRINTABLE, printable
from air_core.specs import ClipPrecision

# C classes, D feature width, T test images.

TEXT, PROMPT, TEST = "text_features.safetensors", "prompt.safetensors", "test.safetensors"
NAMES = {
    TEXT: ("logit_scale", "text_features"),
    PROMPT: ("prompt",),
    TEST: ("index", "labels", "predictions"),
}
TOP = {
    "classnames": list,
    "template": str,
    "modality": str,
    "backbone": dict,
    "metrics": dict,
    "test": dict,
    "lineage": dict,
}
BACKBONE = {"files": dict, "settings": dict, "open_clip": dict, "precision": str}
TESTED = {"dataset": str, "digest": str, "images": int}
MODALITIES = ("text", "visual")
PRECISIONS = get_args(ClipPrecision)
SHA256 = re.compile("[0-9a-f]{64}")
UNIT = 1e-3  # largest deviation of the length of a class vector from 1

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # by file, then by name


def check_contents(content: Mapping[str, Any], arrays: Arrays) -> None:
    """Check that settings and arrays are complete, of the right types, and consistent.

    Args:
        content: that of bundle.json; format and digests are not checked.
        arrays: of the safetensors files.

    Raises:
        ValueError: they are not; the message has the first problem.
    """
    _check_types(content, TOP, "")
    _check_classnames(content["classnames"])
    _check_template(content["template"])
    _check_one_of(content["modality"], MODALITIES, "modality")
    if not isinstance(content.get("prompt"), dict | None):
        raise ValueError("its prompt is not a dict")
    _check_backbone(content["backbone"])
    _check_test(content["test"], len(content["classnames"]))
    _check_metrics(content["metrics"], test_metric(content["test"]))
    if PROMPT in arrays and content.get("prompt") is None:
        raise ValueError(f"it has no prompt, but contains {PROMPT}")
    for name in (TEXT, TEST, *([PROMPT] if content.get("prompt") is not None else [])):
        if name not in arrays:
            raise ValueError(f"{name} is missing")
    for name, of in arrays.items():
        if tuple(sorted(of)) != NAMES[name]:
            raise ValueError(f"{name} must contain exactly {', '.join(NAMES[name])}")
    _check_texts(arrays[TEXT], len(content["classnames"]))
    if PROMPT in arrays:
        _check_prompt(arrays[PROMPT]["prompt"])
    _check_predictions(arrays[TEST], content["test"]["images"], len(content["classnames"]))


def test_metric(test: Mapping[str, Any]) -> str:
    """The test metric of a bundle: the harmonic mean for TRZSL, otherwise the accuracy."""
    return "test/accuracy" if test["unseen"] is None else "test/harmonic_mean"


def check_digests(digests: Any, where: str) -> None:
    """Check that a value maps file names to SHA-256 digests.

    Raises:
        ValueError: it does not.
    """
    fits = isinstance(digests, dict) and all(
        isinstance(digest, str) and SHA256.fullmatch(digest) for digest in digests.values()
    )
    if not fits:
        raise ValueError(f"its {where} is not a dict of file names and SHA-256 digests")


# ---------------------------------------------------------------- bundle.json


def _check_types(found: Mapping[str, Any], wanted: Mapping[str, type], where: str) -> None:
    for name, kind in wanted.items():
        value = found.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"its {where}{name} is missing or not a {kind.__name__}")


def _check_one_of(value: str, allowed: Sequence[str], where: str) -> None:
    if value not in allowed:
        raise ValueError(f"its {where} is {printable(value)!r}; allowed: {', '.join(allowed)}")


def _check_classnames(classnames: Sequence[Any]) -> None:
    if not classnames:
        raise ValueError("its classnames are empty")
    for name in classnames:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a class name is {name!r}; allowed: a non-empty text")
        if UNPRINTABLE.search(name):
            raise ValueError(f"the class name {printable(name)!r} has control characters")
    if len(set(classnames)) < len(classnames):
        raise ValueError("two of its classes have the same name")


def _check_template(template: str) -> None:
    if not is_template(template):
        raise ValueError(
            f"its template is {printable(template)!r}; allowed: a text with {{}} once, for the "
            "class name"
        )


def _check_backbone(backbone: Mapping[str, Any]) -> None:
    _check_types(backbone, BACKBONE, "backbone.")
    check_digests(backbone["files"], "backbone.files")
    _check_one_of(backbone["precision"], PRECISIONS, "backbone.precision")
    if not isinstance(backbone.get("name"), str | None):
        raise ValueError("its backbone.name is not a str")


def _check_test(test: Mapping[str, Any], classes: int) -> None:
    _check_types(test, TESTED, "test.")
    unseen = test.get("unseen", "")
    if unseen is None:
        return
    fits = isinstance(unseen, list) and all(type(c) is int and 0 <= c < classes for c in unseen)
    if not fits or not 0 < len(set(unseen)) == len(unseen) < classes:
        raise ValueError("its test.unseen is neither null nor a list of some of its classes")


def _check_metrics(metrics: Mapping[str, Any], wanted: str) -> None:
    for name, value in metrics.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"its metric {printable(name)} is not a finite number")
    if wanted not in metrics:
        raise ValueError(f"its metric {wanted} is missing")


# ---------------------------------------------------------------- arrays


def _check_texts(of: Mapping[str, np.ndarray], classes: int) -> None:
    texts, scale = of["text_features"], of["logit_scale"]
    if texts.dtype != np.float32 or texts.ndim != 2 or not texts.shape[1]:
        raise ValueError(
            f"text_features are {_array_text(texts)}; expected: float32 (classes, width)"
        )
    if len(texts) != classes:
        raise ValueError(f"{TEXT} has {len(texts)} classes, but there are {classes} class names")
    lengths = np.linalg.norm(texts.astype(np.float64), axis=1)  # (C,)
    if not (np.abs(lengths - 1) <= UNIT).all():  # NaN fails this check, too
        raise ValueError("text_features have vectors whose length is not 1")
    if scale.dtype != np.float32 or scale.shape or not np.isfinite(scale) or scale <= 0:
        raise ValueError(f"logit_scale is {_array_text(scale)}; expected: one positive float32")


def _check_prompt(prompt: np.ndarray) -> None:
    if not np.issubdtype(prompt.dtype, np.floating) or prompt.ndim not in (2, 3) or not prompt.size:
        raise ValueError(
            f"the prompt is {_array_text(prompt)}; expected: floats of 2 or 3 dimensions"
        )
    if not np.isfinite(prompt).all():
        raise ValueError("the prompt has values that are not finite")


def _check_predictions(of: Mapping[str, np.ndarray], images: int, classes: int) -> None:
    for name, values in of.items():
        if not np.issubdtype(values.dtype, np.signedinteger) or values.ndim != 1:
            raise ValueError(
                f"{name} of {TEST} is {_array_text(values)}; expected: integers (images,)"
            )
        if len(values) != images or not images:
            raise ValueError(
                f"{name} of {TEST} has {len(values)} images, but test.images is {images}"
            )
        if values.min() < 0 or (name != "index" and values.max() >= classes):
            raise ValueError(f"{name} of {TEST} has values out of range")


def _array_text(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
