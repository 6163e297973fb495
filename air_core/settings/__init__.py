"""Settings of a trial, as frozen dataclasses. Imports the standard library only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, TypeVar

from air_core.settings.components import (
    AUXILIARIES,
    FIDELITIES,
    LEARNERS,
    LOSSES,
    STRATEGIES,
    TRANSDUCTIONS,
    Own,
    Registry,
)
from air_core.settings.conditions import (
    draws_images,
    fills_bank,
    labelled_lora,
    labelled_only,
    reads_lora,
    selects_images,
    selects_real_images,
    trains_on_synthetic,
    uses_auxiliary,
    uses_evidence,
    uses_generator,
    uses_images,
)

S = TypeVar("S")


def knob(default: Any, help: str, **facts: Any) -> Any:
    """A settings field with a default and one line of help.

    Args:
        facts: limits (ge, gt, le, lt); `used_if`, a condition on TrialSettings without which the
            field cannot change a result; `unused`, its value then, by default `default`. Fields
            that only some components of a registry read are declared there, in `reads`.
    """
    names = ("ge", "gt", "le", "lt")
    limits = {name: facts.pop(name) for name in names if name in facts}
    return field(default=default, metadata={"help": help, "limits": limits, **facts})


def choice(registry: Registry, default: str, **facts: Any) -> Any:
    """A knob that names a component of a registry."""
    return knob(default, "", registry=registry, **facts)


def group(default: Any, **facts: Any) -> Any:
    """A field of TrialSettings with settings; `used_if` is for all of them."""
    return field(default=default, metadata=facts)


def _only(kind: type[S], settings: Any) -> S:
    """The part of settings that their base class `kind` declares."""
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(settings, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A dataset or model, by content. Only the digest enters a key, not the name or a path."""

    name: str
    digest: str
    images: int = field(default=0, compare=False)  # image files of a dataset; not in the key
    labelled: int | None = field(default=None, compare=False)  # of them, in labels.csv; likewise
    kind: str = field(default="", compare=False)  # class of a generator's pipeline; not in the key


Precision = Literal["fp32", "bf16"]
UNKNOWN = -1  # label of an image without a label

ClipPrecision = Literal["fp32", "tf32", "fp16", "bf16"]
FusionSpace = Literal["probability", "logit"]
Level = Literal["features", "tokens"]
Paradigm = Literal["ul", "ssl", "trzsl"]


# ---------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Division of a dataset into unlabelled pool, labelled, validation and test images."""

    paradigm: Paradigm = knob(
        "ul", "ul: no labels; ssl: a few per class; trzsl: all of seen classes, none of unseen ones"
    )
    split_seed: int = knob(
        0,
        "changes the labelled shots, and pool and test where a dataset has no fixed split",
        ge=0,
        le=2**32 - 1,
    )
    pool: Literal["train", "train+val"] = knob(
        "train+val", "parts that the pool is taken from; with train, val stays out"
    )
    shots: int = knob(
        2, "ssl: labelled images per class", ge=1, used_if=lambda s: s.paradigm == "ssl"
    )
    class_seed: int = knob(
        500,
        "trzsl: which classes are seen; published are 500, 0 and 200",
        ge=0,
        le=2**32 - 1,
        used_if=lambda s: s.paradigm == "trzsl",
    )
    leaky_pool: bool = knob(
        False, "eurosat: test images stay in the pool, only to compare with published numbers"
    )
    pool_size: int | None = knob(
        None, "largest pool, and in trzsl labelled part, drawn by split_seed; null: all", ge=1
    )
    pool_ratio: float = knob(
        1.0, "simulated imbalance: images of the commonest class over those of the rarest", ge=1
    )
    pool_missing: float = knob(
        0.0, "simulated: share of the classes without any pool image", ge=0, lt=1
    )


@dataclass(frozen=True, kw_only=True)
class InitialLabelsSettings:
    """Pseudo-labelled images that the LoRA is trained on."""

    kind: Literal["top_k", "pool"] = knob(
        "top_k",
        "top_k: the most confident of each class; pool: all, each as its most probable class",
    )
    k: int = knob(
        16,
        "images per class",
        ge=1,
        used_if=lambda s: s.initial_labels.kind != "pool" or s.paradigm != "ul",
    )
    true_share: float | None = knob(
        None,
        "bounds alone: share of the images of a class that belong to it; null: as CLIP labels them",
        ge=0,
        le=1,
        used_if=lambda s: s.initial_labels.kind == "top_k" and not labelled_lora(s),
    )


LoraSource = Literal["all", "pseudo", "labelled"]
Templates = str | tuple[str, ...]
SEVERAL = "; of a list, image i has text i modulo their number; `class = text` is of one class"


@dataclass(frozen=True, kw_only=True)
class LoraTraining:
    """Training of one LoRA."""

    rank: int = knob(4, "rank of the adapters (alpha equals it)", ge=1)
    steps: int = knob(
        2000, "optimiser steps", ge=1, used_if=lambda s: s.lora is None or s.lora.passes is None
    )
    batch: int = knob(8, "images per step", ge=1)
    learning_rate: float = knob(1e-4, "AdamW, 10 % warm-up, cosine to 0", gt=0)
    caption: Templates = knob(
        "a photo of a {}",
        "of a training image; {} is its class, a caption without it is of the domain" + SEVERAL,
    )
    precision: Precision = knob("bf16", "of frozen weights and the computation; adapters are fp32")
    passes: int | None = knob(None, "passes over the training images, instead of steps", ge=1)
    flip: bool = knob(False, "mirror each training image with probability 0.5")

    def steps_on(self, images: int) -> int:
        """Optimiser steps on this many training images."""
        return self.steps if self.passes is None else math.ceil(self.passes * images / self.batch)


@dataclass(frozen=True, kw_only=True)
class LoraSettings(LoraTraining):
    """`lora: null` turns LoRA off."""

    scale: float = knob(1.0, "weight of the adapters when images are generated", ge=0, le=2)
    source: LoraSource = knob(
        "all",
        "training images where some have labels: all, pseudo or labelled",
        used_if=lambda s: s.paradigm != "ul",
    )

    def training(self) -> LoraTraining:
        return _only(LoraTraining, self)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Generation of images; every setting is in the key of the images."""

    seed: int = knob(0, "changes every image", ge=0, used_if=draws_images)
    template: Templates = knob(
        "a photo of a {}", "prompt, with one {} for the class name" + SEVERAL, used_if=draws_images
    )
    guidance_scale: float = knob(7.5, "classifier-free guidance", ge=0, used_if=draws_images)
    num_inference_steps: int = knob(25, "denoising steps", ge=1, used_if=draws_images)
    size: int = knob(512, "side of the square image, in pixels", ge=8)
    # Pixels depend on the composition of a batch, so a block is one batch and part of the key.
    block: int = knob(
        8, "images of one class that are generated together", ge=1, used_if=uses_images
    )
    precision: Precision = knob("bf16", "of the weights and the computation", used_if=draws_images)


@dataclass(frozen=True, kw_only=True)
class FidelitySettings:
    """Selection of the synthetic images of the auxiliary classifier."""

    kind: str = choice(FIDELITIES, "class_mean")
    keep: int = knob(16, "images per class that are kept", ge=1)
    own: Own = ()  # of components from plugins


@dataclass(frozen=True, kw_only=True)
class AuxiliarySettings:
    """The image-image classifier."""

    kind: str = choice(AUXILIARIES, "prototype")
    source: Literal["synthetic", "real", "both"] = knob(
        "synthetic", "real: pseudo-labelled pool images, the control without diffusion"
    )
    center: bool = knob(True, "subtract the mean synthetic and the mean real feature")
    temperature: Literal["match_confidence", "logit_scale", "kappa"] = knob(
        "match_confidence", "match_confidence: same confidence on the pool as the text classifier"
    )
    kappa: float = knob(
        100.0,
        "with temperature: kappa, the factor on cosines",
        gt=0,
        used_if=lambda s: s.auxiliary.temperature == "kappa",
    )
    neighbours: int = knob(16, "knn: nearest images per class that are averaged", ge=1)
    rounds: int = knob(
        1, "selections of real images in each iteration", ge=1, used_if=selects_real_images
    )
    k: int = knob(
        32,
        "real images per class that join the bank (source real or both)",
        ge=1,
        used_if=selects_real_images,
    )
    refresh: bool = knob(
        False,
        "select real images again in each iteration",
        used_if=lambda s: selects_real_images(s) and s.iterations > 1,
    )
    k_step: int = knob(
        0,
        "with refresh: more real images per class in each iteration",
        ge=0,
        used_if=lambda s: s.auxiliary.refresh,
    )
    fade: bool = knob(
        False,
        "with refresh: fewer synthetic images in each iteration",
        used_if=lambda s: s.auxiliary.refresh and s.auxiliary.source == "both",
    )
    own: Own = ()  # of components from plugins


@dataclass(frozen=True, kw_only=True)
class FusionSettings:
    """Fusion of text, auxiliary and evidence, beside `fusion_weight` and `evidence.weight`."""

    space: FusionSpace = knob("probability", "space of the average")
    schedule: Literal["fixed", "annealed"] = knob(
        "fixed",
        "annealed: the weight falls linearly to 0 over the iterations",
        used_if=lambda s: s.iterations > 1,
    )


@dataclass(frozen=True, kw_only=True)
class PseudoLabelSettings:
    """Training targets from scores."""

    kind: str = choice(STRATEGIES, "candidates")
    growth: Literal["fixed", "growing"] = knob(
        "growing",
        "fixed: k per class; growing: more in each iteration, in the last all of the pool",
    )
    k: int = knob(
        16,
        "images per class with growth: fixed",
        ge=1,
        used_if=lambda s: s.pseudo_labels.growth == "fixed",
    )
    alpha: float = knob(0.75, "candidates: quantile of confidence over images", ge=0, le=1)
    beta: float = knob(0.95, "candidates: quantile of a class's scores over images", ge=0, le=1)
    threshold: float = knob(0.7, "threshold: smallest confidence of an image", ge=0, le=1)
    loss: str = choice(LOSSES, "cc")
    own: Own = ()  # of components from plugins


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """The learned prompt."""

    length: int = knob(16, "context vectors, or tokens beside the patches", ge=1, le=64)
    depth: Literal["shallow", "deep"] = knob("shallow", "visual; deep: new tokens in every block")
    own: Own = ()  # of components from plugins


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """SGD with momentum 0.9 on the prompt."""

    epochs: int = knob(
        50,
        "passes over the selected images in each iteration",
        ge=1,
        used_if=lambda s: s.train.steps is None,
    )
    steps: int | None = knob(None, "optimiser steps in each iteration, instead of epochs", ge=1)
    batch: int = knob(64, "real images per step", ge=1)
    synthetic_batch: int = knob(
        64, "synthetic images per step", ge=1, used_if=lambda s: s.synthetic_weight > 0
    )
    learning_rate: float = knob(0.02, "peak", gt=0)
    weight_decay: float = knob(0.05, "on the prompt", ge=0)
    warmup: float = knob(0.04, "share of the steps; then cosine to 0", ge=0, lt=1)
    clip: float = knob(0.8, "largest norm of the prompt's gradient", gt=0)
    mix: Literal["both", "real", "synthetic"] = knob(
        "both",
        "training images: real pseudo-labelled, synthetic, or both",
        used_if=trains_on_synthetic,
    )
    labelled_weight: float = knob(
        1.0,
        "weight of the loss on labelled images",
        ge=0,
        used_if=lambda s: s.supervision == "pseudo" and s.paradigm != "ul",
    )
    labelled_among: Literal["all", "seen"] = knob(
        "all",
        "trzsl: classes in the softmax of labelled images; seen: without unseen ones",
        used_if=lambda s: s.paradigm == "trzsl",
    )


@dataclass(frozen=True, kw_only=True)
class EvidenceScoring:
    """Denoising errors of pool images; every setting is in the key of the errors."""

    template: Templates = knob(
        "a photo of a {}",
        "caption of a class, with one {} for its name; a list can have `class = text` for some",
    )
    low: float = knob(0.4, "least noisy time step, as a share of the model's steps", ge=0, le=1)
    high: float = knob(0.9, "noisiest time step", ge=0, le=1)
    top: int | None = knob(
        None, "classes of an image that are scored, by zero-shot CLIP; null: all", ge=2
    )
    prune_after: int | None = knob(
        None, "draws after which only the `prune_to` best classes of an image go on", ge=1
    )
    prune_to: int = knob(
        2, "see prune_after", ge=2, used_if=lambda s: s.evidence.prune_after is not None
    )
    block: int = knob(256, "images of a shard", ge=1)
    precision: Precision = knob("bf16", "of the weights and the computation")


@dataclass(frozen=True, kw_only=True)
class EvidenceSettings(EvidenceScoring):
    """Classification of pool images by the denoising error of the diffusion model."""

    draws: int = knob(0, "draws of noise per image and class; 0: no evidence", ge=0, le=1000)
    images: int | None = knob(
        None, "pool images that are scored, a random sample; null: all of the pool", ge=1
    )
    weight: float = knob(0.3, "share of the evidence in the scores of the pool", ge=0, le=1)
    schedule: Literal["fixed", "annealed"] = knob(
        "fixed",
        "annealed: the weight falls linearly to 0 over the iterations",
        used_if=lambda s: s.iterations > 1,
    )
    confidence: float = knob(0.8, "mean largest probability of the evidence", gt=0, lt=1)
    balance: Literal["none", "sinkhorn"] = knob(
        "none", "sinkhorn: all classes get the same share of the pool"
    )

    def scoring(self) -> EvidenceScoring:
        return _only(EvidenceScoring, self)


@dataclass(frozen=True, kw_only=True)
class TrialSettings(SplitSettings):
    """All settings of one trial. `air_core.settings.flat` converts them to flat keys such as
    `lora.rank`."""

    dataset: Ref
    backbone: Ref
    generator: Ref = group(MISSING, used_if=uses_generator, unused=Ref(name="", digest=""))
    # None: `dataset` itself
    test_dataset: Ref | None = group(None, used_if=lambda s: s.test_dataset != s.dataset)
    precision: ClipPrecision = knob(
        "tf32",
        "of CLIP's weights; tf32: fp32, on a GPU with products in TF32; norms, logits and loss "
        "stay fp32",
    )
    modality: str = choice(LEARNERS, "text")
    supervision: Literal["pseudo", "labelled"] = knob(
        "pseudo",
        "labelled: the few labelled images alone, no pseudo-labels (CoOp, VPT)",
        used_if=lambda s: s.iterations > 0,
    )
    transduction: str = choice(TRANSDUCTIONS, "none", used_if=lambda s: not labelled_only(s))
    initial_labels: InitialLabelsSettings = group(
        InitialLabelsSettings(),
        used_if=lambda s: s.lora is not None or s.images_from == "lora_images",
    )
    lora: LoraSettings | None = group(LoraSettings(), used_if=reads_lora, unused=None)
    generation: GenerationSettings = group(GenerationSettings(), used_if=uses_generator)
    images_per_class: int = knob(
        120,
        "synthetic images per class that the trial reads",
        ge=0,
        le=1_000_000,
        used_if=fills_bank,
        unused=0,
    )
    images_from: Literal["generator", "lora_images", "true_labels", "shifted_labels"] = knob(
        "generator",
        "lora_images: the images that the LoRA is trained on (control); bounds: true_labels: pool "
        "images under their true labels; shifted_labels: synthetic ones, each as the next class",
        used_if=fills_bank,
    )
    fidelity: FidelitySettings = group(FidelitySettings(), used_if=selects_images)
    auxiliary: AuxiliarySettings = group(AuxiliarySettings(), used_if=uses_auxiliary)
    fusion_weight: float = knob(
        0.5,
        "share of the auxiliary classifier; 0 = none",
        ge=0,
        le=1,
        used_if=uses_auxiliary,
        unused=0.0,
    )
    fusion: FusionSettings = group(FusionSettings(), used_if=uses_auxiliary)
    evidence: EvidenceSettings = group(EvidenceSettings(), used_if=uses_evidence)
    pseudo_labels: PseudoLabelSettings = group(
        PseudoLabelSettings(), used_if=lambda s: s.iterations > 0 and not labelled_only(s)
    )
    synthetic_weight: float = knob(
        1.0,
        "weight of the loss on synthetic images; 0 = none",
        ge=0,
        used_if=trains_on_synthetic,
        unused=0.0,
    )
    iterations: int = knob(
        10,
        "rounds of pseudo-labelling and prompt learning",
        ge=0,
        used_if=lambda s: not labelled_only(s),
        unused=1,
    )
    prompt: PromptSettings = group(PromptSettings(), used_if=lambda s: s.iterations > 0)
    train: TrainSettings = group(TrainSettings(), used_if=lambda s: s.iterations > 0)
    seed: int = knob(0, "prompt start and batch order", ge=0, used_if=lambda s: s.iterations > 0)

    @property
    def split(self) -> SplitSettings:
        return _only(SplitSettings, self)
