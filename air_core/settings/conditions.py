"""Conditions on a trial that decide which settings and inputs it uses.

Imports the standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from air_core.settings.components import LEARNERS

if TYPE_CHECKING:
    from air_core.settings import Ref, TrialSettings


def labelled_only(spec: TrialSettings) -> bool:
    """Whether the trial learns from labelled images without pseudo-labels."""
    return spec.supervision == "labelled" and spec.iterations > 0


def uses_auxiliary(spec: TrialSettings) -> bool:
    """Whether an auxiliary classifier is fused."""
    return spec.fusion_weight > 0 and (
        spec.auxiliary.source != "synthetic" or spec.images_per_class > 0
    )


def has_context(spec: TrialSettings) -> bool:
    """Whether learned vectors stand before the class names."""
    return spec.iterations > 0 and "context" in LEARNERS[spec.modality].facts


def reads_tokens(spec: TrialSettings) -> bool:
    """Whether the learner reads image tokens beside the features."""
    return spec.iterations > 0 and "tokens" in LEARNERS[spec.modality].facts


def can_transfer(spec: TrialSettings) -> bool:
    """Whether the trial can be tested with other class names."""
    return spec.iterations == 0 or "transfers" in LEARNERS[spec.modality].facts


def trains_on_synthetic(spec: TrialSettings) -> bool:
    """Whether synthetic images enter the training loss."""
    return (
        spec.iterations > 0
        and spec.synthetic_weight > 0
        and spec.images_per_class > 0
        and spec.train.mix != "real"
    )


def trains_on_real(spec: TrialSettings) -> bool:
    """Whether pseudo-labelled pool images enter the training loss."""
    return spec.iterations > 0 and spec.supervision == "pseudo" and spec.train.mix != "synthetic"


def fills_bank(spec: TrialSettings) -> bool:
    """Whether the trial reads synthetic images, or others in their place."""
    fused = uses_auxiliary(spec) and spec.auxiliary.source != "real" and spec.images_per_class > 0
    return fused or trains_on_synthetic(spec)


def uses_images(spec: TrialSettings) -> bool:
    """Whether the trial reads synthetic images."""
    return fills_bank(spec) and spec.images_from in ("generator", "shifted_labels")


def uses_evidence(spec: TrialSettings) -> bool:
    """Whether the trial reads denoising errors."""
    return spec.evidence.draws > 0 and not labelled_only(spec)


def uses_generator(spec: TrialSettings) -> bool:
    """Whether the trial depends on a generator: its images or its denoising errors."""
    return uses_images(spec) or uses_evidence(spec)


def selects_images(spec: TrialSettings) -> bool:
    """Whether the auxiliary classifier is built from a selection of synthetic images."""
    return uses_auxiliary(spec) and spec.auxiliary.source != "real"


def selects_real_images(spec: TrialSettings) -> bool:
    """Whether the auxiliary classifier, or the selection of its images, reads real images."""
    return spec.auxiliary.source != "synthetic" or spec.fidelity.kind == "real_mean"


def labelled_lora(spec: TrialSettings) -> bool:
    """Whether the LoRA is trained on labelled images alone."""
    return spec.lora is not None and spec.lora.source == "labelled" and spec.paradigm != "ul"


def reads_lora_images(spec: TrialSettings) -> bool:
    """Whether the trial reads a LoRA's training images and no diffusion model, as a control."""
    return spec.images_from == "lora_images" and not uses_evidence(spec)


def reads_lora(spec: TrialSettings) -> bool:
    """Whether the trial reads a LoRA, if LoRA is on, or its training images."""
    if is_folder(spec.generator):
        return reads_lora_images(spec)
    return uses_generator(spec) or spec.images_from == "lora_images"


def draws_images(spec: TrialSettings) -> bool:
    """Whether a generator draws the synthetic images that are read."""
    return uses_images(spec) and not is_folder(spec.generator)


def is_folder(generator: Ref) -> bool:
    """Whether the generator is a folder of ready images."""
    return generator.name.startswith("folder:")
