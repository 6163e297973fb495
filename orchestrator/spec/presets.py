"""Methods and worlds as tables. No code path depends on a method's name: a method is its keys.

A preset *pins* the keys that define the method and *sets* defaults for others.
Precedence: default < world < preset < fixed < grid < space.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from air_core.specs import Ref


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the method table."""

    pins: dict[str, Any]
    sets: dict[str, Any] = field(default_factory=dict)
    host: str | None = None  # what it adds synthetic images to, and is compared with
    control: str | None = None  # the same without diffusion
    paradigms: tuple[str, ...] = ("ul", "ssl", "trzsl")  # cells of others are left out


_NO_IMAGES: dict[str, Any] = {
    "images_per_class": 0,
    "auxiliary.source": "synthetic",
    "fusion_weight": 0.0,
    "synthetic_weight": 0.0,
}
_LABELS = ("ssl", "trzsl")
_ONE_ROUND = {"iterations": 1, "pseudo_labels.kind": "top_k", "pseudo_labels.growth": "fixed"}
_LABELLED = {
    "supervision": "labelled",
    "iterations": 1,
    "train.labelled_among": "seen",  # else no image is ever taken for an unseen class
    **_NO_IMAGES,
}
_GRIP = {"pseudo_labels.kind": "top_k", "pseudo_labels.growth": "growing"}
_CPL = {"pseudo_labels.kind": "candidates", "pseudo_labels.growth": "growing"}
_REAL = {"images_per_class": 0, "auxiliary.source": "real", "synthetic_weight": 0.0}
_REFRESH = {"auxiliary.refresh": True}  # real prototypes get better as labels do: a fair control

METHODS: dict[str, Method] = {
    "zero_shot": Method(pins={"iterations": 0, **_NO_IMAGES}),
    "zero_shot_aux": Method(pins={"iterations": 0}, host="zero_shot"),
    "zero_shot_real": Method(
        pins={"iterations": 0, **_REAL},
        sets={"auxiliary.kind": "lda", "auxiliary.rounds": 10},
        host="zero_shot",
    ),
    "transductive": Method(
        pins={"iterations": 0, "transduction": "gmm", **_NO_IMAGES}, host="zero_shot"
    ),
    "coop": Method(pins={**_LABELLED, "modality": "text"}, host="zero_shot", paradigms=_LABELS),
    "vpt": Method(pins={**_LABELLED, "modality": "visual"}, host="zero_shot", paradigms=_LABELS),
    "fpl": Method(pins={**_ONE_ROUND, **_NO_IMAGES}, host="zero_shot"),
    "ifpl": Method(
        pins={"pseudo_labels.kind": "top_k", "pseudo_labels.growth": "fixed", **_NO_IMAGES},
        host="zero_shot",
    ),
    "grip": Method(pins={**_GRIP, **_NO_IMAGES}, host="zero_shot"),
    "cpl": Method(pins={**_CPL, **_NO_IMAGES}, host="zero_shot"),
    "air": Method(pins=_CPL, host="cpl", control="cpl_real"),
    "air_fpl": Method(pins=_ONE_ROUND, host="fpl"),
    "air_grip": Method(pins=_GRIP, host="grip", control="grip_real"),
    "cpl_real": Method(pins={**_CPL, **_REAL}, sets=_REFRESH, host="cpl"),
    "grip_real": Method(pins={**_GRIP, **_REAL}, sets=_REFRESH, host="grip"),
}

# Defaults that depend on the world, by the key and the value that choose them; the last wins.
# Everything else is the default of air_core.specs: Stable Diffusion 1.5 and CLIP ViT-B/32.
WORLDS: dict[tuple[str, str], dict[str, Any]] = {
    # The validation part of the digits is the same for every split and stays out of the pool.
    ("dataset", "digits"): {"pool": "train"},
    ("generator", "tiny"): {
        "initial_labels.k": 32,
        "lora.rank": 8,
        "lora.steps": 300,
        "lora.batch": 16,
        "lora.learning_rate": 2e-3,
        "lora.rounds": 2,
        # bf16 is emulated, and ten times slower, on processors without instructions for it.
        "lora.precision": "fp32",
        "generation.precision": "fp32",
        "generation.guidance_scale": 4.0,
        "generation.num_inference_steps": 10,
        "generation.size": 32,
        "generation.block": 16,
        "fidelity.kind": "none",
        "auxiliary.kind": "lda",
    },
    ("backbone", "tiny"): {
        "auxiliary.kind": "lda",
        "pseudo_labels.alpha": 0.9,
        "pseudo_labels.beta": 0.9,
        "train.steps": 100,
        "train.learning_rate": 0.2,
        "train.weight_decay": 0.01,
        "train.warmup": 0.05,
        "synthetic_weight": 0.0,
    },
}

# Defaults of one method in one world: the synthetic loss pays in a single round only.
METHOD_WORLDS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("backbone", "tiny", "air_fpl"): {"synthetic_weight": 0.3},
}

# Names that stand for "what is embedded".
OUTSIDE: dict[str, str] = {"dataset": "digits", "backbone": "tiny", "generator": "tiny"}


def named_refs(flat: dict[str, Any]) -> dict[str, Ref]:
    """Outside names of flat settings as Refs that are equal where names are; reads no file."""
    names = {key: flat.get(key, default) for key, default in OUTSIDE.items()}
    if flat.get("test_dataset") is not None:
        names["test_dataset"] = flat["test_dataset"]
    return {key: Ref(name=str(name), digest=str(name)) for key, name in names.items()}


def defaults(method: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """Defaults of a method under the world that `chosen` (fixed and grid keys) picks.

    Args:
        method: a key of METHODS.
        chosen: dotted keys that the sweep file sets; only dataset, backbone, generator are read.

    Returns:
        Dotted keys that differ from the defaults of air_core.specs; the preset's are included.
    """
    outside = {key: chosen.get(key, default) for key, default in OUTSIDE.items()}
    flat: dict[str, Any] = dict(outside)
    for (key, value), settings in WORLDS.items():
        if outside[key] == value:
            flat |= settings
    for (key, value, name), settings in METHOD_WORLDS.items():
        if outside[key] == value and name == method:
            flat |= settings
    return flat | METHODS[method].sets | METHODS[method].pins
