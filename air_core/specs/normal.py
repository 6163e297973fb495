"""Normalise trial specs: reset settings that cannot change a result, so that keys are equal.

Imports the standard library only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from air_core.specs import (
    AuxiliarySettings,
    EvidenceSettings,
    FidelitySettings,
    FusionSettings,
    GenerationSettings,
    InitialLabelsSettings,
    LoraSettings,
    PromptSettings,
    PseudoLabelSettings,
    Ref,
    TrainSettings,
    TrialSpec,
    fills_bank,
    is_folder,
    labels_use_evidence,
    trains_on_synthetic,
    uses_auxiliary,
    uses_evidence,
    uses_generator,
    uses_images,
)


@lru_cache(maxsize=4096)  # a plan normalises each trial three times
def normalised(spec: TrialSpec) -> TrialSpec:
    """The same computation, with all settings that cannot change its result at their defaults."""
    for is_irrelevant, reset in IRRELEVANT:
        if is_irrelevant(spec):
            changed = {k: v for k, v in reset(spec).items() if getattr(spec, k) != v}
            spec = replace(spec, **changed) if changed else spec
    return spec


def _selecting_nothing(spec: TrialSpec) -> FidelitySettings:
    """Fidelity settings of a trial whose auxiliary classifier has no synthetic image.

    The filters stay, since the loss may read synthetic images.
    """
    return replace(spec.fidelity, kind=FidelitySettings.kind, keep=FidelitySettings.keep)


def _weighed_by_agreement(spec: TrialSpec) -> dict[str, Any]:
    """Without fixed weights; with equal ones where two classifiers are fused (air_core.fusion)."""
    both = uses_auxiliary(spec) and uses_evidence(spec)
    v = EvidenceSettings.weight if both else 0.5
    evidence = replace(spec.evidence, weight=v, schedule="fixed")
    return {
        "fusion_weight": TrialSpec.fusion_weight if spec.fusion_weight else 0.0,
        "fusion": replace(spec.fusion, weights="agreement" if both else "fixed", schedule="fixed"),
        "evidence": evidence if uses_evidence(spec) else spec.evidence,
    }


# Pairs of a condition and the settings that it makes irrelevant, applied in this order.
IRRELEVANT: tuple[tuple[Any, Any], ...] = (
    (lambda s: s.test_dataset == s.dataset, lambda s: {"test_dataset": None}),
    (lambda s: s.paradigm != "ssl", lambda s: {"shots": 2}),
    (
        lambda s: s.paradigm != "trzsl",
        lambda s: {
            "class_seed": 500,
            "labelled_size": None,
            "train": replace(s.train, labelled_among="all"),
        },
    ),
    (
        lambda s: s.paradigm == "ul" and s.lora is not None,
        lambda s: {"lora": replace(s.lora, source="all")},
    ),
    (
        lambda s: s.iterations == 0,
        lambda s: {
            "supervision": "pseudo",
            "pseudo_labels": PseudoLabelSettings(),
            "prompt": PromptSettings(),
            "train": TrainSettings(),
            "synthetic_weight": 0.0,
            "seed": 0,
            "auxiliary": replace(s.auxiliary, refresh=False),
            "fusion": replace(s.fusion, schedule="fixed"),
            "evidence": replace(s.evidence, schedule="fixed"),
        },
    ),
    (
        lambda s: s.supervision == "labelled" or s.paradigm == "ul",
        lambda s: {"train": replace(s.train, labelled_weight=1.0)},
    ),
    (
        # Without pseudo-labels their settings are irrelevant.
        lambda s: s.supervision == "labelled" and s.iterations > 0,
        lambda s: {
            "pseudo_labels": PseudoLabelSettings(),
            "iterations": 1,
            "transduction": "none",
            "evidence": replace(s.evidence, draws=0),
        },
    ),
    (
        lambda s: not uses_evidence(s),
        lambda s: {"evidence": EvidenceSettings(**vars(s.evidence.scoring()))},
    ),
    (lambda s: s.fusion.weights == "agreement", _weighed_by_agreement),
    (
        lambda s: s.evidence.prune_after is None,
        lambda s: {"evidence": replace(s.evidence, prune_to=EvidenceSettings.prune_to)},
    ),
    (
        lambda s: s.iterations == 1,
        lambda s: {
            "auxiliary": replace(s.auxiliary, refresh=False),
            "fusion": replace(s.fusion, schedule="fixed"),
            "evidence": replace(s.evidence, schedule="fixed"),
            "prompt": replace(s.prompt, restart=True),
            "train": replace(s.train, synthetic_schedule="fixed"),
        },
    ),
    (
        lambda s: s.images_per_class == 0 and s.auxiliary.source == "both",
        lambda s: {"auxiliary": replace(s.auxiliary, source="real")},
    ),
    (
        lambda s: not uses_auxiliary(s),
        lambda s: {
            "fusion_weight": 0.0,
            "fusion": FusionSettings(),
            "auxiliary": AuxiliarySettings(),
            "fidelity": _selecting_nothing(s),
        },
    ),
    (
        lambda s: s.auxiliary.source == "synthetic" and s.fidelity.kind != "real_mean",
        lambda s: {
            "auxiliary": replace(s.auxiliary, k=AuxiliarySettings.k, refresh=False, rounds=1),
        },
    ),
    (
        lambda s: s.auxiliary.kind != "knn",
        lambda s: {"auxiliary": replace(s.auxiliary, neighbours=AuxiliarySettings.neighbours)},
    ),
    (
        lambda s: s.auxiliary.temperature != "kappa",
        lambda s: {"auxiliary": replace(s.auxiliary, kappa=AuxiliarySettings.kappa)},
    ),
    (lambda s: s.auxiliary.source == "real", lambda s: {"fidelity": _selecting_nothing(s)}),
    (
        lambda s: not s.auxiliary.refresh,
        lambda s: {"auxiliary": replace(s.auxiliary, k_step=0)},
    ),
    (
        lambda s: not s.auxiliary.refresh or s.auxiliary.source != "both",
        lambda s: {"auxiliary": replace(s.auxiliary, fade=False)},
    ),
    (
        lambda s: s.fidelity.kind in ("none", "argmax"),
        lambda s: {"fidelity": replace(s.fidelity, keep=FidelitySettings.keep)},
    ),
    (
        lambda s: not trains_on_synthetic(s),
        lambda s: {
            "synthetic_weight": 0.0,
            "train": replace(s.train, mix="both", synthetic_schedule="fixed"),
        },
    ),
    (
        lambda s: s.synthetic_weight == 0,
        lambda s: {"train": replace(s.train, synthetic_batch=TrainSettings.synthetic_batch)},
    ),
    (
        lambda s: not fills_bank(s),
        lambda s: {
            "images_per_class": 0,
            "images_from": "generator",
            "fidelity": FidelitySettings(),
        },
    ),
    (
        # The control reads the images of a first round, chosen without a diffusion model.
        lambda s: s.images_from == "lora_images" and not uses_evidence(s),
        lambda s: {"lora": LoraSettings(source=s.lora.source if s.lora else "all")},
    ),
    (
        lambda s: not uses_generator(s) and s.images_from != "lora_images",
        lambda s: {"lora": None},
    ),
    (
        lambda s: not uses_generator(s),
        lambda s: {
            "generator": Ref(name="", digest=""),
            "generation": GenerationSettings(),
        },
    ),
    (
        lambda s: is_folder(s.generator),
        lambda s: {
            "lora": None,
            "generation": GenerationSettings(size=s.generation.size, block=s.generation.block),
        },
    ),
    (
        # Only the size of the LoRA's training images counts.
        lambda s: (
            not uses_images(s)
            and s.evidence.disputed is None
            and (s.lora is None or s.lora.rounds == 1)
        ),
        lambda s: {"generation": GenerationSettings(size=s.generation.size)},
    ),
    (
        lambda s: s.lora is None and s.images_from != "lora_images",
        lambda s: {"initial_labels": InitialLabelsSettings()},
    ),
    (
        lambda s: s.lora is not None and s.lora.passes is not None,
        lambda s: {"lora": replace(s.lora, steps=LoraSettings.steps)},
    ),
    (
        lambda s: s.initial_labels.kind == "pool" and s.paradigm == "ul",
        lambda s: {"initial_labels": replace(s.initial_labels, k=InitialLabelsSettings.k)},
    ),
    (
        lambda s: s.lora is None or s.lora.rounds == 1,
        lambda s: {
            "initial_labels": replace(
                s.initial_labels,
                images_per_class=InitialLabelsSettings.images_per_class,
                evidence_draws=0,
            )
        },
    ),
    (
        lambda s: s.lora is not None and s.lora.rounds == 1,
        lambda s: {"lora": replace(s.lora, enough_kept=1.0)},
    ),
    (
        lambda s: s.lora is not None and s.lora.source == "labelled",
        lambda s: {"initial_labels": replace(s.initial_labels, evidence_draws=0)},
    ),
    (
        lambda s: not uses_evidence(s) and not labels_use_evidence(s),
        lambda s: {"evidence": EvidenceSettings()},
    ),
    (
        lambda s: s.pseudo_labels.growth == "growing",
        lambda s: {"pseudo_labels": replace(s.pseudo_labels, k=PseudoLabelSettings.k)},
    ),
    (
        lambda s: s.pseudo_labels.kind != "candidates",
        lambda s: {
            "pseudo_labels": replace(
                s.pseudo_labels,
                alpha=PseudoLabelSettings.alpha,
                beta=PseudoLabelSettings.beta,
                loss="cc",
            )
        },
    ),
    (
        lambda s: s.pseudo_labels.kind != "threshold",
        lambda s: {
            "pseudo_labels": replace(s.pseudo_labels, threshold=PseudoLabelSettings.threshold)
        },
    ),
    (
        lambda s: s.pseudo_labels.kind == "threshold",
        lambda s: {
            "pseudo_labels": replace(s.pseudo_labels, growth="growing", k=PseudoLabelSettings.k)
        },
    ),
    (
        lambda s: s.modality == "text",
        lambda s: {"prompt": replace(s.prompt, depth="shallow", init="normal")},
    ),
    (
        lambda s: s.train.steps is not None,
        lambda s: {"train": replace(s.train, epochs=TrainSettings.epochs)},
    ),
)
