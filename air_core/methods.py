"""Methods as a table of settings. No code path depends on a method's name.

A method *pins* the settings that define it and *sets* defaults for others. Defaults that depend on
the dataset, the backbone or the generator are of sweep files (`orchestrator.spec.presets`). Imports
no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from air_core.settings import Ref, TrialSettings
from air_core.settings.components import Component, Registry
from air_core.settings.flat import from_flat
from air_core.settings.normal import normalised

# Embedded dataset, CLIP and diffusion model: the defaults of the three names.
EMBEDDED: dict[str, str] = {"dataset": "digits", "backbone": "tiny", "generator": "tiny"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the method table."""

    summary: str
    pins: dict[str, Any]
    sets: dict[str, Any] = field(default_factory=dict)
    host: str | None = "zero_shot"  # the method without auxiliary images, for comparison
    control: str | None = None  # the same method without diffusion
    is_bound: bool = False  # no method: it reads true labels, or wrong ones on purpose
    paradigms: tuple[str, ...] = ("ul", "ssl", "trzsl")  # in others it is not defined

    def trial(self, settings: Mapping[str, Any] | None = None) -> TrialSettings:
        """A trial of this method, for `air_core.method.learn`.

        Args:
            settings: dotted keys, such as `train.steps`; others keep the defaults of
                `air_core.settings`.

        Raises:
            ValueError: the method pins a key to another value.

        >>> METHODS["cpl"].trial({"train.steps": 100}).train.steps
        100
        """
        settings = settings or {}
        for key, value in settings.items():
            if key in self.pins and value != self.pins[key]:
                raise ValueError(f"the method pins {key} to {self.pins[key]!r}")
        flat = {**self.sets, **settings, **self.pins}
        return normalised(from_flat(flat, named_refs(flat)))


def named_refs(flat: Mapping[str, Any]) -> dict[str, Ref]:
    """Dataset, backbone and generator of flat settings as Refs; a digest here is the name.

    Reads no file.
    """
    names = {key: flat.get(key, default) for key, default in EMBEDDED.items()}
    if flat.get("test_dataset") is not None:
        names["test_dataset"] = flat["test_dataset"]
    return {key: Ref(name=str(name), digest=str(name)) for key, name in names.items()}


_NO_EVIDENCE: dict[str, Any] = {"evidence.draws": 0}
# No method reads a true label of a pool image.
_GENERATOR: dict[str, Any] = {"images_from": "generator", "initial_labels.true_share": None}
_PLAIN = {**_GENERATOR, **_NO_EVIDENCE}
_TEXT_ONLY: dict[str, Any] = {
    **_GENERATOR,
    "images_per_class": 0,
    "auxiliary.source": "synthetic",
    "fusion_weight": 0.0,
    "synthetic_weight": 0.0,
}
_NO_IMAGES = {**_TEXT_ONLY, **_NO_EVIDENCE}
_LABELS = ("ssl", "trzsl")
_ONE_ROUND = {"iterations": 1, "pseudo_labels.kind": "top_k", "pseudo_labels.growth": "fixed"}
_LABELLED = {
    "supervision": "labelled",
    "iterations": 1,
    "train.labelled_among": "seen",  # otherwise the prompt never predicts an unseen class
    **_NO_IMAGES,
}
_GRIP = {"pseudo_labels.kind": "top_k", "pseudo_labels.growth": "growing"}
_CPL = {"pseudo_labels.kind": "candidates", "pseudo_labels.growth": "growing"}
_REAL_BANK = {
    **_GENERATOR,
    "images_per_class": 0,
    "auxiliary.source": "real",
    "synthetic_weight": 0.0,
}
_REAL = {**_REAL_BANK, **_NO_EVIDENCE}
_REFRESH = {"auxiliary.refresh": True}  # a fair control: real images improve with the labels
# AiR as published and read in docs/method.md: synthetic images alone, selected once, in the
# auxiliary classifier and in the loss.
_AIR = {
    "auxiliary.source": "synthetic",
    "auxiliary.kind": "prototype",
    "fidelity.kind": "class_mean",
    "synthetic_weight": 1.0,
}
# Ours: real images join the auxiliary classifier in each round, and synthetic ones leave.
_BOTH = {
    "auxiliary.source": "both",
    "auxiliary.refresh": True,
    "auxiliary.fade": True,
    "auxiliary.k": 16,
    "auxiliary.k_step": 16,
    "synthetic_weight": 0.0,
}
# Another reading of the paper: the LoRA learns the domain, from all of the pool and one caption.
_DOMAIN = {"initial_labels.kind": "pool", "lora.caption": "a photo"}
# The weight falls where an auxiliary classifier of real images improves with the rounds.
_EVIDENCE = {"evidence.draws": 8, "evidence.weight": 0.8}
_EARLY_EVIDENCE = {**_EVIDENCE, "evidence.schedule": "annealed"}
# Images in the place of the synthetic ones: those that the LoRA is trained on, pool images under
# their true labels, synthetic images under the label of the next class.
_INSTEAD = {
    "control": ("lora_images", "AiR with the images that the LoRA is trained on"),
    "ceiling": ("true_labels", "a bound: AiR with pool images under their true labels"),
    "floor": ("shifted_labels", "a bound: AiR with each synthetic image under the next class"),
}
# A LoRA that reads a given share of right labels, by default all; the control has its images.
_LABELS_PINS = {k: v for k, v in {**_CPL, **_PLAIN}.items() if k != "initial_labels.true_share"}
_LABELS_SETS = {**_AIR, "initial_labels.true_share": 1.0}

_METHODS = {
    "zero_shot": Method(
        summary="CLIP without training", pins={"iterations": 0, **_NO_IMAGES}, host=None
    ),
    "zero_shot_aux": Method(
        summary="CLIP and an auxiliary classifier of synthetic images, without training",
        pins={"iterations": 0, **_PLAIN},
    ),
    "zero_shot_real": Method(
        summary="CLIP and an auxiliary classifier of pseudo-labelled real images, without training",
        pins={"iterations": 0, **_REAL},
        sets={"auxiliary.kind": "lda", "auxiliary.rounds": 10},
    ),
    "transductive": Method(
        summary="CLIP and a Gaussian mixture of the pool, without training",
        pins={"iterations": 0, "transduction": "gmm", **_NO_IMAGES},
    ),
    "coop": Method(
        summary="CoOp: a text prompt from the labelled images alone",
        pins={**_LABELLED, "modality": "text"},
        paradigms=_LABELS,
    ),
    "vpt": Method(
        summary="VPT: a visual prompt from the labelled images alone",
        pins={**_LABELLED, "modality": "visual"},
        paradigms=_LABELS,
    ),
    "upl": Method(
        summary="UPL: a prompt from the most confident images of each predicted class",
        pins={**_ONE_ROUND, "pseudo_labels.kind": "predicted", **_NO_IMAGES},
    ),
    "fpl": Method(
        summary="FPL: a prompt from the most confident images for each class, in one round",
        pins={**_ONE_ROUND, **_NO_IMAGES},
    ),
    "ifpl": Method(
        summary="IFPL: FPL in several rounds",
        pins={"pseudo_labels.kind": "top_k", "pseudo_labels.growth": "fixed", **_NO_IMAGES},
    ),
    "pseudo": Method(
        summary="a prompt from pseudo-labels of any kind (pseudo_labels.*)", pins=_NO_IMAGES
    ),
    "grip": Method(
        summary="GRIP: FPL in several rounds, with more images in each",
        pins={**_GRIP, **_NO_IMAGES},
    ),
    "cpl": Method(
        summary="CPL: a prompt from images with several candidate classes",
        pins={**_CPL, **_NO_IMAGES},
    ),
    "air": Method(
        summary="AiR on CPL: synthetic images in the auxiliary classifier and in the loss",
        pins={**_CPL, **_PLAIN},
        sets=_AIR,
        host="cpl",
        control="air_control",
    ),
    "air_fpl": Method(summary="AiR on FPL", pins={**_ONE_ROUND, **_PLAIN}, sets=_AIR, host="fpl"),
    "air_grip": Method(
        summary="AiR on GRIP", pins={**_GRIP, **_PLAIN}, sets=_AIR, host="grip", control="grip_real"
    ),
    "air_domain": Method(
        summary="AiR whose LoRA learns the domain, from all of the pool and one caption",
        pins={**_CPL, **_PLAIN},
        sets=_AIR | _DOMAIN,
        host="cpl",
        control="air",
    ),
    **{
        f"air_{role}": Method(
            summary=summary,
            pins={**_CPL, **_PLAIN, "images_from": images},
            sets=_AIR,
            host="cpl",
            is_bound=role != "control",
        )
        for role, (images, summary) in _INSTEAD.items()
    },
    "air_labels": Method(
        summary="a bound: AiR with a given share of right labels for the LoRA",
        pins=_LABELS_PINS,
        sets=_LABELS_SETS,
        host="cpl",
        control="air_labels_control",
        is_bound=True,
    ),
    "air_labels_control": Method(
        summary="a bound: air_labels with the images that the LoRA is trained on",
        pins={**_LABELS_PINS, "images_from": "lora_images"},
        sets=_LABELS_SETS,
        host="cpl",
        is_bound=True,
    ),
    "air_both": Method(
        summary="ours: an auxiliary classifier that synthetic images leave and real ones join",
        pins={**_CPL, **_PLAIN},
        sets=_BOTH,
        host="cpl",
        control="cpl_real",
    ),
    "air_evidence": Method(
        summary="AiR with denoising errors of the diffusion model",
        pins={**_CPL, **_GENERATOR},
        sets={**_AIR, **_EARLY_EVIDENCE},
        host="cpl",
        control="air_control",
    ),
    "cpl_evidence": Method(
        summary="CPL with denoising errors of the diffusion model",
        pins={**_CPL, **_TEXT_ONLY},
        sets=_EVIDENCE,
        host="cpl",
    ),
    "cpl_real_evidence": Method(
        summary="cpl_real with denoising errors of the diffusion model",
        pins={**_CPL, **_REAL_BANK},
        sets={**_REFRESH, **_EARLY_EVIDENCE},
        host="cpl",
        control="cpl_real",
    ),
    "cpl_real": Method(
        summary="CPL and an auxiliary classifier of real images, chosen in each round",
        pins={**_CPL, **_REAL},
        sets=_REFRESH,
        host="cpl",
    ),
    "grip_real": Method(
        summary="GRIP and an auxiliary classifier of real images, chosen in each round",
        pins={**_GRIP, **_REAL},
        sets=_REFRESH,
        host="grip",
    ),
}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
Registry(
    "method",
    "",
    (Component(name, "air_core.methods:METHODS", one.summary) for name, one in METHODS.items()),
    is_open=False,
    of_trials=False,
)

# Methods by their accuracy on the digits without labels (docs/experiments.md). Where no image is
# labelled, this order selects a better classifier than any score that needs no labels.
PREFERENCE = (
    *("cpl_real_evidence", "cpl_real", "grip_real", "air_both", "cpl_evidence", "air_evidence"),
    *("zero_shot_real", "transductive", "air_control", "cpl", "air_domain", "air", "air_grip"),
    *("grip", "ifpl", "air_fpl", "fpl", "upl", "zero_shot_aux", "zero_shot"),
)
