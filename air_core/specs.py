"""What to compute, as plain frozen data. Standard library only; nothing here computes.

`*Settings` are the knobs a person turns. `*Spec` is all that one stage may read: its own settings
and the specs of the stages above it, whole. So the nesting of specs is the dependency graph, and
a stage cannot depend on a setting that is not in its key. Where and on how many machines something
runs is never said here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any, Literal


def knob(default: Any, help: str, **limits: float) -> Any:
    """A settings field with a default, one line of help and limits (ge, gt, le, lt)."""
    return field(default=default, metadata={"help": help, "limits": limits})


def later(default: Any, help: str, **limits: float) -> Any:
    """A knob that was added when results existed: what its absence meant is its default.

    With that value it stays out of keys (orchestrator.keys), so that old results stay valid.
    """
    metadata = {"help": help, "limits": limits, "absent_means": default}
    return field(default=default, metadata=metadata)


def added(default: Any) -> Any:
    """Settings that were added when results existed: see `later`."""
    return field(default=default, metadata={"absent_means": default})


# Parts of the code and their versions, where no recipe number covers them: see
# orchestrator.store.code_version. A spec of one stage has the versions alone.
CodeVersions = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A thing outside, by content. Only the digest enters a key, never the name or a path."""

    name: str
    digest: str


Precision = Literal["fp32", "bf16"]
ClipPrecision = Literal["fp32", "fp16", "bf16"]
Level = Literal["features", "tokens"]
Paradigm = Literal["ul", "ssl", "trzsl"]
PARADIGMS = "ul: no label at all; ssl: a few per class; trzsl: all of seen classes, none of others"


# ---------------------------------------------------------------- settings

SPLIT_SEED = "moves pool and test where a dataset has no fixed split, and the labelled shots"
POOL = "parts that the pool is taken from; train keeps val out"
SHOTS = "ssl: labelled images per class"
CLASS_SEED = "trzsl: which classes are seen; published are 500, 0 and 200"
POOL_SIZE = "at most so many pool images, a part that split_seed moves; null: all"
POOL_RATIO = "simulated imbalance: the commonest class has so many times the images of the rarest"
POOL_MISSING = "simulated: share of the classes that no pool image is from"
LEAKY = "eurosat: test images stay in the pool, to compare with published numbers only"


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Which images are the unlabelled pool, which are for validation, which for test."""

    paradigm: Paradigm = knob("ul", PARADIGMS)
    split_seed: int = knob(0, SPLIT_SEED, ge=0, le=2**32 - 1)
    pool: Literal["train", "train+val"] = knob("train+val", POOL)
    shots: int = later(2, SHOTS, ge=1)
    class_seed: int = later(500, CLASS_SEED, ge=0, le=2**32 - 1)
    leaky_pool: bool = later(False, LEAKY)
    pool_size: int | None = later(None, POOL_SIZE, ge=1)
    pool_ratio: float = later(1.0, POOL_RATIO, ge=1)
    pool_missing: float = later(0.0, POOL_MISSING, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class InitialLabelsSettings:
    """The pseudo-labelled images that the LoRA is trained on."""

    kind: Literal["top_k"] = knob("top_k", "top_k: the most confident images of each class")
    k: int = knob(16, "images per class", ge=1)
    images_per_class: int = knob(
        120, "synthetic images per class of the LoRA round before, for lora.rounds > 1", ge=1
    )


LoraSource = Literal["all", "pseudo", "labelled"]
LORA_SOURCE = "images that it is trained on, where some have labels: all, pseudo or labelled"


@dataclass(frozen=True, kw_only=True)
class LoraTraining:
    """How one LoRA is trained."""

    rank: int = knob(4, "rank of the adapters (alpha equals it)", ge=1)
    steps: int = knob(2000, "optimiser steps", ge=1)
    batch: int = knob(8, "images per step", ge=1)
    learning_rate: float = knob(1e-4, "AdamW, 10 % warm-up, cosine to 0", gt=0)
    caption: str = knob("a photo of a {}", "of a training image, with {} once for its class")
    precision: Precision = knob("bf16", "autocast of the U-Net")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(LoraTraining):
    """`lora: null` turns LoRA off."""

    scale: float = knob(1.0, "weight of the adapters when images are drawn", ge=0, le=2)
    rounds: int = knob(
        1, "2: a fresh LoRA on labels that the first one's images helped to choose", ge=1, le=3
    )

    source: LoraSource = later("all", LORA_SOURCE)

    def training(self) -> LoraTraining:
        names = [f.name for f in dataclasses.fields(LoraTraining)]
        return LoraTraining(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How images are drawn. All of it is in the images' key."""

    seed: int = knob(0, "moves every image", ge=0)
    template: str = knob("a photo of a {}", "prompt, with {} once for the class name")
    guidance_scale: float = knob(7.5, "classifier-free guidance", ge=0)
    num_inference_steps: int = knob(25, "denoising steps", ge=1)
    size: int = knob(512, "side of the square image, in pixels", ge=8)
    # Pixels change with the composition of a batch, so the block is the batch and part of the key.
    block: int = knob(8, "images of one class that are drawn together", ge=1)
    precision: Precision = knob("bf16", "autocast of the pipeline")


@dataclass(frozen=True, kw_only=True)
class FidelitySettings:
    """Which synthetic images are used (min_margin, duplicates), and which of them build the
    auxiliary classifier (kind, keep)."""

    kind: Literal["class_mean", "text", "argmax", "real_mean", "random", "none"] = knob(
        "class_mean",
        "nearest to: class_mean, text or real_mean of their class; argmax: CLIP takes it for it",
    )
    keep: int = knob(16, "images per class that are kept", ge=1)
    min_margin: float | None = later(
        None, "least zero-shot score of its class minus the best other's; null: all", ge=-1, le=1
    )
    duplicates: Literal["keep", "drop"] = later(
        "keep", "drop: an image that CLIP cannot tell from an earlier one of its class"
    )


@dataclass(frozen=True, kw_only=True)
class AuxiliarySettings:
    """The image-image classifier."""

    kind: Literal["prototype", "lda", "knn", "cache", "linear_probe"] = knob(
        "prototype",
        "prototype: class means; lda; knn: nearest images; cache: Tip-Adapter's; linear_probe",
    )
    source: Literal["synthetic", "real", "both"] = knob(
        "synthetic", "real: pseudo-labelled pool images, the control without diffusion"
    )
    center: bool = knob(True, "subtract the mean synthetic and the mean real feature")
    temperature: Literal["match_entropy", "logit_scale", "kappa"] = knob(
        "match_entropy", "match_entropy: as confident on the pool as the text classifier"
    )
    kappa: float = later(100.0, "with temperature: kappa, what cosines are multiplied by", gt=0)
    neighbours: int = later(16, "knn: nearest images per class that are averaged", ge=1)
    rounds: int = later(1, "real images are chosen again so often in one iteration", ge=1)
    k: int = knob(32, "real images per class that join the bank (source real or both)", ge=1)
    refresh: bool = knob(False, "real images are chosen again in each iteration")
    k_step: int = knob(0, "with refresh: more real images per class in each iteration", ge=0)
    fade: bool = knob(False, "with refresh: synthetic images leave as real ones join")


@dataclass(frozen=True, kw_only=True)
class FusionSettings:
    """How text and auxiliary classifier are put together, beside `fusion_weight`."""

    space: Literal["probability", "logit"] = later("probability", "what is averaged")
    schedule: Literal["fixed", "annealed"] = later(
        "fixed", "annealed: the weight falls linearly to 0 over the iterations"
    )


@dataclass(frozen=True, kw_only=True)
class PseudoLabelSettings:
    """How scores become training targets."""

    kind: Literal["top_k", "threshold", "candidates"] = knob(
        "candidates", "top_k: K most confident per class; threshold; candidates: CPL's sets"
    )
    growth: Literal["fixed", "growing"] = knob(
        "growing", "fixed: k per class; growing: until the pool is covered"
    )
    k: int = knob(16, "images per class with growth: fixed", ge=1)
    alpha: float = knob(0.75, "candidates: quantile of confidence over images", ge=0, le=1)
    beta: float = knob(0.95, "candidates: quantile of a class's scores over images", ge=0, le=1)
    threshold: float = later(0.7, "threshold: least confidence of an image", ge=0, le=1)
    loss: Literal["cc", "ce", "rc"] = later(
        "cc", "on candidate sets: cc: mass of the set; ce: soft cross-entropy; rc: re-weighted"
    )


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """The learned prompt."""

    length: int = knob(16, "context vectors, or tokens beside the patches", ge=1, le=64)
    depth: Literal["shallow", "deep"] = later("shallow", "visual; deep: new tokens in every block")
    init: Literal["normal", "uniform"] = later("normal", "visual: how tokens start")
    restart: bool = later(True, "each iteration starts from the same prompt again")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """SGD with momentum 0.9 on the prompt."""

    epochs: int = knob(50, "passes over the selected images in each iteration", ge=1)
    steps: int | None = knob(None, "optimiser steps in each iteration, instead of epochs", ge=1)
    batch: int = knob(64, "real images per step", ge=1)
    synthetic_batch: int = knob(64, "synthetic images per step", ge=1)
    learning_rate: float = knob(0.02, "peak", gt=0)
    weight_decay: float = knob(0.05, "on the prompt", ge=0)
    warmup: float = knob(0.04, "share of the steps; then cosine to 0", ge=0, lt=1)
    clip: float = knob(0.8, "largest norm of the prompt's gradient", gt=0)
    mix: Literal["both", "real", "synthetic"] = later(
        "both", "training images: real pseudo-labelled, synthetic, or both"
    )
    labelled_weight: float = later(1.0, "weight of the loss on labelled images", ge=0)
    labelled_among: Literal["all", "seen"] = later(
        "all", "trzsl: classes in the softmax of labelled images; seen: unseen ones stay out"
    )
    synthetic_schedule: Literal["fixed", "fade"] = later(
        "fixed", "fade: synthetic_weight falls linearly to 0 over the iterations"
    )


# ---------------------------------------------------------------- specs of the stages


@dataclass(frozen=True, kw_only=True)
class FeaturesSpec:
    """What a frozen CLIP makes of every image of a dataset.

    level: features, one vector an image; or the tokens of its patches, for visual prompts.
    """

    dataset: Ref
    backbone: Ref
    precision: ClipPrecision = "fp32"
    level: Level = later("features", "features or tokens")
    code: str = added("")


@dataclass(frozen=True, kw_only=True)
class LabelsSpec:
    """Pseudo-labelled pool images for the LoRA.

    images: None: zero-shot CLIP alone; else CLIP fused with an auxiliary classifier built on the
    first `settings.images_per_class` images of each class (a later LoRA round).
    """

    features: FeaturesSpec
    split: SplitSettings
    settings: InitialLabelsSettings
    images: SyntheticFeaturesSpec | None = None
    source: LoraSource = later("all", LORA_SOURCE)
    code: str = added("")


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """One LoRA of a diffusion model on pseudo-labelled images."""

    labels: LabelsSpec
    model: Ref
    training: LoraTraining
    size: int
    code: str = added("")


@dataclass(frozen=True, kw_only=True)
class GeneratedImages:
    """An endless seeded row of images per class. How many are drawn is not part of it."""

    kind: Literal["generated"] = "generated"
    model: Ref
    classnames: tuple[str, ...]
    lora: LoraSpec | None
    lora_scale: float
    settings: GenerationSettings
    code: str = added("")

    @property
    def block_size(self) -> int:
        return self.settings.block


@dataclass(frozen=True, kw_only=True)
class FolderImages:
    """Images that somebody made already, in one folder a class."""

    kind: Literal["folder"] = "folder"
    model: Ref
    classnames: tuple[str, ...]
    size: int
    block: int
    code: str = added("")

    @property
    def block_size(self) -> int:
        return self.block


@dataclass(frozen=True, kw_only=True)
class SyntheticFeaturesSpec:
    """What a frozen CLIP makes of synthetic images: a row like the images themselves."""

    images: GeneratedImages | FolderImages
    backbone: Ref
    precision: ClipPrecision = "fp32"
    level: Level = later("features", "features or tokens")
    code: str = added("")

    def blocks(self, images_per_class: int) -> int:
        """Blocks of one class that hold its first images."""
        return -(-images_per_class // self.images.block_size)


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: flat at the door (`lora.rank`), nested inside."""

    dataset: Ref
    classnames: tuple[str, ...] = ()  # follows from the dataset; in no key of its own
    code: CodeVersions = ()  # in its key: the version of the trials' part
    backbone: Ref
    generator: Ref
    test_dataset: Ref | None = added(None)  # None: `dataset` itself
    precision: ClipPrecision = knob("fp32", "of CLIP's weights; norms, logits and loss stay fp32")
    paradigm: Paradigm = knob("ul", PARADIGMS)
    modality: Literal["text", "visual"] = knob(
        "text", "text: CoOp context vectors; visual: VPT tokens"
    )
    split_seed: int = knob(0, SPLIT_SEED, ge=0, le=2**32 - 1)
    pool: Literal["train", "train+val"] = knob("train+val", POOL)
    shots: int = later(2, SHOTS, ge=1)
    class_seed: int = later(500, CLASS_SEED, ge=0, le=2**32 - 1)
    leaky_pool: bool = later(False, LEAKY)
    pool_size: int | None = later(None, POOL_SIZE, ge=1)
    pool_ratio: float = later(1.0, POOL_RATIO, ge=1)
    pool_missing: float = later(0.0, POOL_MISSING, ge=0, lt=1)
    supervision: Literal["pseudo", "labelled"] = later(
        "pseudo", "labelled: the few labelled images alone, no pseudo-labels (CoOp, VPT)"
    )
    transduction: Literal["none", "gmm"] = later(
        "none", "gmm: text scores are refined by a mixture model over the whole pool"
    )
    initial_labels: InitialLabelsSettings = InitialLabelsSettings()
    lora: LoraSettings | None = LoraSettings()
    generation: GenerationSettings = GenerationSettings()
    images_per_class: int = knob(120, "synthetic images per class that the trial reads", ge=0)
    fidelity: FidelitySettings = FidelitySettings()
    auxiliary: AuxiliarySettings = AuxiliarySettings()
    fusion_weight: float = knob(0.5, "share of the auxiliary classifier; 0 = none", ge=0, le=1)
    fusion: FusionSettings = added(FusionSettings())
    pseudo_labels: PseudoLabelSettings = PseudoLabelSettings()
    synthetic_weight: float = knob(1.0, "weight of the loss on synthetic images; 0 = none", ge=0)
    iterations: int = knob(10, "rounds of pseudo-labelling and prompt learning", ge=0)
    prompt: PromptSettings = PromptSettings()
    train: TrainSettings = TrainSettings()
    seed: int = knob(0, "prompt start and batch order", ge=0)

    # The dependency graph, on one screen.

    @property
    def split(self) -> SplitSettings:
        return SplitSettings(
            paradigm=self.paradigm,
            split_seed=self.split_seed,
            pool=self.pool,
            shots=self.shots if self.paradigm == "ssl" else 2,
            class_seed=self.class_seed if self.paradigm == "trzsl" else 500,
            leaky_pool=self.leaky_pool,
            pool_size=self.pool_size,
            pool_ratio=self.pool_ratio,
            pool_missing=self.pool_missing,
        )

    @property
    def features(self) -> FeaturesSpec:
        return self._features_of(self.dataset)

    def _features_of(self, dataset: Ref) -> FeaturesSpec:
        return FeaturesSpec(
            dataset=dataset,
            backbone=self.backbone,
            precision=self.precision,
            code=self.code_of("features", reader_of(dataset.name)),
        )

    def code_of(self, *parts: str) -> str:
        """Versions of these parts of the code; empty where recipe numbers cover them."""
        known = dict(self.code)
        return "+".join(known[part] for part in parts if part in known)

    @property
    def tokens(self) -> FeaturesSpec | None:
        """None: no visual prompt is learned."""
        return self._tokens_of(self.features)

    @property
    def test_features(self) -> FeaturesSpec | None:
        """Of the other dataset that the prompt is tested on; None: there is none."""
        return None if self.test_dataset is None else self._features_of(self.test_dataset)

    @property
    def test_tokens(self) -> FeaturesSpec | None:
        return self._tokens_of(self.test_features)

    def _tokens_of(self, features: FeaturesSpec | None) -> FeaturesSpec | None:
        if features is None or self.modality == "text" or self.iterations == 0:
            return None
        return replace(features, level="tokens")

    @property
    def lora_adapter(self) -> LoraSpec | None:
        """None: LoRA is off, or no images are used."""
        images = self.images
        return images.lora if isinstance(images, GeneratedImages) else None

    @property
    def images(self) -> GeneratedImages | FolderImages | None:
        """The row that the trial reads from; None: it reads none."""
        if not uses_images(self):
            return None
        return _images(self, self.lora.rounds if self.lora else 0)

    @property
    def base_images(self) -> GeneratedImages | None:
        """The same row without LoRA, to show what LoRA changed."""
        if self.lora_adapter is None:
            return None
        row = _images(self, 0)
        return row if isinstance(row, GeneratedImages) else None

    @property
    def synthetic_features(self) -> SyntheticFeaturesSpec | None:
        images = self.images
        return None if images is None else _synthetic(self, images)

    @property
    def synthetic_tokens(self) -> SyntheticFeaturesSpec | None:
        """None: no visual prompt is trained on synthetic images."""
        row = self.synthetic_features
        if row is None or self.modality == "text" or not trains_on_synthetic(self):
            return None
        return replace(row, level="tokens")


def uses_auxiliary(spec: TrialSpec) -> bool:
    """Is an auxiliary classifier fused?"""
    return spec.fusion_weight > 0 and (
        spec.auxiliary.source != "synthetic" or spec.images_per_class > 0
    )


def trains_on_synthetic(spec: TrialSpec) -> bool:
    """Do synthetic images enter the training loss?"""
    return (
        spec.iterations > 0
        and spec.synthetic_weight > 0
        and spec.images_per_class > 0
        and spec.train.mix != "real"
    )


def trains_on_real(spec: TrialSpec) -> bool:
    """Do pseudo-labelled pool images enter the training loss?"""
    return spec.iterations > 0 and spec.supervision == "pseudo" and spec.train.mix != "synthetic"


def uses_images(spec: TrialSpec) -> bool:
    """Does the trial read synthetic images at all?"""
    fused = uses_auxiliary(spec) and spec.auxiliary.source != "real" and spec.images_per_class > 0
    return fused or trains_on_synthetic(spec)


def is_folder(generator: Ref) -> bool:
    """Are the images somebody's folder rather than drawn?"""
    return generator.name.startswith("folder:")


def reader_of(dataset: str) -> str:
    """The part of the code that reads a dataset: the module of its name in `air_core.datasets`.

    >>> reader_of("cub"), reader_of("folder:/data/birds")
    ('datasets.cub', 'datasets.image_folder')
    """
    return "datasets.image_folder" if ":" in dataset else f"datasets.{dataset}"


def _images(spec: TrialSpec, rounds: int) -> GeneratedImages | FolderImages:
    """The row of images after this many LoRA rounds."""
    if is_folder(spec.generator):
        return FolderImages(
            model=spec.generator,
            classnames=spec.classnames,
            size=spec.generation.size,
            block=spec.generation.block,
            code=spec.code_of("images"),
        )
    return GeneratedImages(
        model=spec.generator,
        classnames=spec.classnames,
        lora=_lora(spec, spec.lora, rounds) if spec.lora and rounds else None,
        lora_scale=spec.lora.scale if spec.lora and rounds else 1.0,
        settings=spec.generation,
        code=spec.code_of("images"),
    )


def _lora(spec: TrialSpec, lora: LoraSettings, rounds: int) -> LoraSpec:
    earlier = _synthetic(spec, _images(spec, rounds - 1)) if rounds > 1 else None
    settings = spec.initial_labels
    if earlier is None:
        settings = replace(settings, images_per_class=InitialLabelsSettings.images_per_class)
    return LoraSpec(
        labels=LabelsSpec(
            features=spec.features,
            split=spec.split,
            settings=settings,
            images=earlier,
            source="all" if spec.paradigm == "ul" else lora.source,
            code=spec.code_of("labels"),
        ),
        model=spec.generator,
        training=lora.training(),
        size=spec.generation.size,
        code=spec.code_of("lora"),
    )


def _synthetic(spec: TrialSpec, images: GeneratedImages | FolderImages) -> SyntheticFeaturesSpec:
    return SyntheticFeaturesSpec(
        images=images,
        backbone=spec.backbone,
        precision=spec.precision,
        code=spec.code_of("synthetic"),
    )
