"""What to compute, as plain frozen data. Standard library only; nothing here computes.

`*Settings` are the knobs a person turns. `*Spec` is all that one stage may read: its own settings
and the specs of the stages above it, whole. So the nesting of specs is the dependency graph, and
a stage cannot depend on a setting that is not in its key. Where and on how many machines something
runs is never said here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal


def knob(default: Any, help: str, **limits: float) -> Any:
    """A settings field with a default, one line of help and limits (ge, gt, le, lt).

    A field that is added later also says `metadata["absent_means"]`: with that value it stays out
    of keys, so that old results stay valid (orchestrator.keys).
    """
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A thing outside, by content. Only the digest enters a key, never the name or a path."""

    name: str
    digest: str


Precision = Literal["fp32", "bf16"]


# ---------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Which images are the unlabelled pool, which are for validation, which for test."""

    paradigm: Literal["ul"] = knob("ul", "ul: no label at all")
    split_seed: int = knob(
        0, "moves pool and test where a dataset has no fixed split", ge=0, le=2**32 - 1
    )
    pool: Literal["train", "train+val"] = knob(
        "train+val", "parts that the unlabelled pool is taken from; train keeps val out"
    )


@dataclass(frozen=True, kw_only=True)
class InitialLabelsSettings:
    """The pseudo-labelled images that the LoRA is trained on."""

    kind: Literal["top_k"] = knob("top_k", "top_k: the most confident images of each class")
    k: int = knob(16, "images per class", ge=1)
    images_per_class: int = knob(
        120, "synthetic images per class of the LoRA round before, for lora.rounds > 1", ge=1
    )


@dataclass(frozen=True, kw_only=True)
class LoraTraining:
    """How one LoRA is trained."""

    rank: int = knob(4, "rank of the adapters (alpha equals it)", ge=1)
    steps: int = knob(2000, "optimiser steps", ge=1)
    batch: int = knob(8, "images per step", ge=1)
    learning_rate: float = knob(1e-4, "AdamW, 10 % warm-up, cosine to 0", gt=0)
    caption: str = knob("a photo of a {}", "caption of a training image; {} is its class")
    precision: Precision = knob("bf16", "autocast of the U-Net")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(LoraTraining):
    """`lora: null` turns LoRA off."""

    scale: float = knob(1.0, "weight of the adapters when images are drawn", ge=0, le=2)
    rounds: int = knob(
        1, "2: a fresh LoRA on labels that the first one's images helped to choose", ge=1, le=3
    )

    def training(self) -> LoraTraining:
        names = [f.name for f in dataclasses.fields(LoraTraining)]
        return LoraTraining(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How images are drawn. All of it is in the images' key."""

    seed: int = knob(0, "moves every image", ge=0)
    template: str = knob("a photo of a {}", "prompt; {} is the class name")
    guidance_scale: float = knob(7.5, "classifier-free guidance", ge=0)
    num_inference_steps: int = knob(25, "denoising steps", ge=1)
    size: int = knob(512, "side of the square image, in pixels", ge=8)
    # Pixels change with the composition of a batch, so the block is the batch and part of the key.
    block: int = knob(8, "images of one class that are drawn together", ge=1)
    precision: Precision = knob("bf16", "autocast of the pipeline")


@dataclass(frozen=True, kw_only=True)
class FidelitySettings:
    """Which synthetic images build the auxiliary classifier."""

    kind: Literal["class_mean", "none"] = knob(
        "class_mean", "class_mean: the nearest to their class's mean feature; none: all"
    )
    keep: int = knob(16, "images per class that are kept", ge=1)


@dataclass(frozen=True, kw_only=True)
class AuxiliarySettings:
    """The image-image classifier."""

    kind: Literal["prototype", "lda"] = knob(
        "prototype", "prototype: unit class means, cosine; lda: shrinkage linear discriminant"
    )
    source: Literal["synthetic", "real", "both"] = knob(
        "synthetic", "real: pseudo-labelled pool images, the control without diffusion"
    )
    center: bool = knob(True, "subtract the mean synthetic and the mean real feature")
    temperature: Literal["match_entropy", "logit_scale"] = knob(
        "match_entropy", "match_entropy: as confident on the pool as the text classifier"
    )
    k: int = knob(32, "real images per class that join the bank (source real or both)", ge=1)
    refresh: bool = knob(False, "real images are chosen again in each iteration")
    k_step: int = knob(0, "with refresh: more real images per class in each iteration", ge=0)
    fade: bool = knob(False, "with refresh: synthetic images leave as real ones join")


@dataclass(frozen=True, kw_only=True)
class PseudoLabelSettings:
    """How scores become training targets."""

    kind: Literal["top_k", "candidates"] = knob(
        "candidates", "top_k: K most confident per class; candidates: CPL's candidate sets"
    )
    growth: Literal["fixed", "growing"] = knob(
        "growing", "fixed: k per class; growing: until the pool is covered"
    )
    k: int = knob(16, "images per class with growth: fixed", ge=1)
    alpha: float = knob(0.75, "candidates: quantile of confidence over images", ge=0, le=1)
    beta: float = knob(0.95, "candidates: quantile of a class's scores over images", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """The learned prompt."""

    length: int = knob(16, "context vectors before the class name", ge=1, le=64)


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


# ---------------------------------------------------------------- specs of the stages


@dataclass(frozen=True, kw_only=True)
class FeaturesSpec:
    """Frozen CLIP features of every image of a dataset."""

    dataset: Ref
    backbone: Ref
    precision: Literal["fp32"] = "fp32"


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


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """One LoRA of a diffusion model on pseudo-labelled images."""

    labels: LabelsSpec
    model: Ref
    training: LoraTraining
    size: int


@dataclass(frozen=True, kw_only=True)
class GeneratedImages:
    """An endless seeded row of images per class. How many are drawn is not part of it."""

    kind: Literal["generated"] = "generated"
    model: Ref
    classnames: tuple[str, ...]
    lora: LoraSpec | None
    lora_scale: float
    settings: GenerationSettings

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

    @property
    def block_size(self) -> int:
        return self.block


@dataclass(frozen=True, kw_only=True)
class SyntheticFeaturesSpec:
    """Frozen CLIP features of synthetic images, a row like the images themselves."""

    images: GeneratedImages | FolderImages
    backbone: Ref
    precision: Literal["fp32"] = "fp32"

    def blocks(self, images_per_class: int) -> int:
        """Blocks of one class that hold its first images."""
        return -(-images_per_class // self.images.block_size)


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: flat at the door (`lora.rank`), nested inside."""

    dataset: Ref
    classnames: tuple[str, ...] = ()  # follows from the dataset; in no key of its own
    backbone: Ref
    generator: Ref
    precision: Literal["fp32"] = knob("fp32", "of CLIP")
    paradigm: Literal["ul"] = knob("ul", "ul: no label at all")
    modality: Literal["text"] = knob("text", "text: CoOp context vectors")
    split_seed: int = knob(
        0, "moves pool and test where a dataset has no fixed split", ge=0, le=2**32 - 1
    )
    pool: Literal["train", "train+val"] = knob(
        "train+val", "parts that the unlabelled pool is taken from; train keeps val out"
    )
    initial_labels: InitialLabelsSettings = InitialLabelsSettings()
    lora: LoraSettings | None = LoraSettings()
    generation: GenerationSettings = GenerationSettings()
    images_per_class: int = knob(120, "synthetic images per class that the trial reads", ge=0)
    fidelity: FidelitySettings = FidelitySettings()
    auxiliary: AuxiliarySettings = AuxiliarySettings()
    fusion_weight: float = knob(0.5, "share of the auxiliary classifier; 0 = none", ge=0, le=1)
    pseudo_labels: PseudoLabelSettings = PseudoLabelSettings()
    synthetic_weight: float = knob(1.0, "weight of the loss on synthetic images; 0 = none", ge=0)
    iterations: int = knob(10, "rounds of pseudo-labelling and prompt learning", ge=0)
    prompt: PromptSettings = PromptSettings()
    train: TrainSettings = TrainSettings()
    seed: int = knob(0, "prompt start and batch order", ge=0)

    # The dependency graph, on one screen.

    @property
    def split(self) -> SplitSettings:
        return SplitSettings(paradigm=self.paradigm, split_seed=self.split_seed, pool=self.pool)

    @property
    def features(self) -> FeaturesSpec:
        return FeaturesSpec(dataset=self.dataset, backbone=self.backbone, precision=self.precision)

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

    def normalised(self) -> TrialSpec:
        """The same computation with every setting that cannot matter put to its default."""
        spec = self
        for matters_not, reset in IRRELEVANT:
            if matters_not(spec):
                spec = replace(spec, **reset(spec))
        return spec


def uses_auxiliary(spec: TrialSpec) -> bool:
    """Is an auxiliary classifier fused?"""
    return spec.fusion_weight > 0 and (
        spec.auxiliary.source != "synthetic" or spec.images_per_class > 0
    )


def trains_on_synthetic(spec: TrialSpec) -> bool:
    """Do synthetic images enter the training loss?"""
    return spec.iterations > 0 and spec.synthetic_weight > 0 and spec.images_per_class > 0


def uses_images(spec: TrialSpec) -> bool:
    """Does the trial read synthetic images at all?"""
    fused = uses_auxiliary(spec) and spec.auxiliary.source != "real" and spec.images_per_class > 0
    return fused or trains_on_synthetic(spec)


def is_folder(generator: Ref) -> bool:
    """Are the images somebody's folder rather than drawn?"""
    return generator.name.startswith("folder:")


def _images(spec: TrialSpec, rounds: int) -> GeneratedImages | FolderImages:
    """The row of images after this many LoRA rounds."""
    if is_folder(spec.generator):
        return FolderImages(
            model=spec.generator,
            classnames=spec.classnames,
            size=spec.generation.size,
            block=spec.generation.block,
        )
    return GeneratedImages(
        model=spec.generator,
        classnames=spec.classnames,
        lora=_lora(spec, spec.lora, rounds) if spec.lora and rounds else None,
        lora_scale=spec.lora.scale if spec.lora and rounds else 1.0,
        settings=spec.generation,
    )


def _lora(spec: TrialSpec, lora: LoraSettings, rounds: int) -> LoraSpec:
    earlier = _synthetic(spec, _images(spec, rounds - 1)) if rounds > 1 else None
    settings = spec.initial_labels
    if earlier is None:
        settings = replace(settings, images_per_class=InitialLabelsSettings.images_per_class)
    return LoraSpec(
        labels=LabelsSpec(
            features=spec.features, split=spec.split, settings=settings, images=earlier
        ),
        model=spec.generator,
        training=lora.training(),
        size=spec.generation.size,
    )


def _synthetic(spec: TrialSpec, images: GeneratedImages | FolderImages) -> SyntheticFeaturesSpec:
    return SyntheticFeaturesSpec(images=images, backbone=spec.backbone, precision=spec.precision)


# When a setting cannot matter, in order: (condition, what is reset). One computation, one key.
IRRELEVANT: tuple[tuple[Any, Any], ...] = (
    (
        lambda s: s.iterations == 0,
        lambda s: {
            "pseudo_labels": PseudoLabelSettings(),
            "prompt": PromptSettings(),
            "train": TrainSettings(),
            "synthetic_weight": 0.0,
            "seed": 0,
            "auxiliary": replace(s.auxiliary, refresh=False),
        },
    ),
    (
        lambda s: s.iterations == 1,
        lambda s: {"auxiliary": replace(s.auxiliary, refresh=False)},
    ),
    (
        lambda s: s.images_per_class == 0 and s.auxiliary.source == "both",
        lambda s: {"auxiliary": replace(s.auxiliary, source="real")},
    ),
    (
        lambda s: not uses_auxiliary(s),
        lambda s: {
            "fusion_weight": 0.0,
            "auxiliary": AuxiliarySettings(),
            "fidelity": FidelitySettings(),
        },
    ),
    (
        lambda s: s.auxiliary.source == "synthetic",
        lambda s: {
            "auxiliary": replace(s.auxiliary, k=AuxiliarySettings.k, refresh=False),
        },
    ),
    (lambda s: s.auxiliary.source == "real", lambda s: {"fidelity": FidelitySettings()}),
    (
        lambda s: not s.auxiliary.refresh,
        lambda s: {"auxiliary": replace(s.auxiliary, k_step=0)},
    ),
    (
        lambda s: not s.auxiliary.refresh or s.auxiliary.source != "both",
        lambda s: {"auxiliary": replace(s.auxiliary, fade=False)},
    ),
    (
        lambda s: s.fidelity.kind == "none",
        lambda s: {"fidelity": replace(s.fidelity, keep=FidelitySettings.keep)},
    ),
    (lambda s: not trains_on_synthetic(s), lambda s: {"synthetic_weight": 0.0}),
    (
        lambda s: s.synthetic_weight == 0,
        lambda s: {"train": replace(s.train, synthetic_batch=TrainSettings.synthetic_batch)},
    ),
    (
        lambda s: not uses_images(s),
        lambda s: {
            "images_per_class": 0,
            "lora": None,
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
    (lambda s: s.lora is None, lambda s: {"initial_labels": InitialLabelsSettings()}),
    (
        lambda s: s.lora is not None and s.lora.rounds == 1,
        lambda s: {
            "initial_labels": replace(
                s.initial_labels, images_per_class=InitialLabelsSettings.images_per_class
            )
        },
    ),
    (
        lambda s: s.pseudo_labels.growth == "growing",
        lambda s: {"pseudo_labels": replace(s.pseudo_labels, k=PseudoLabelSettings.k)},
    ),
    (
        lambda s: s.pseudo_labels.kind == "top_k",
        lambda s: {
            "pseudo_labels": replace(
                s.pseudo_labels, alpha=PseudoLabelSettings.alpha, beta=PseudoLabelSettings.beta
            )
        },
    ),
    (
        lambda s: s.train.steps is not None,
        lambda s: {"train": replace(s.train, epochs=TrainSettings.epochs)},
    ),
)


# ---------------------------------------------------------------- the door


@dataclass(frozen=True, kw_only=True)
class Key:
    """A trial key as people write it: `lora.rank`."""

    name: str
    type: Any  # annotation, for validation
    default: Any
    limits: dict[str, float]
    help: str


@cache
def trial_keys() -> dict[str, Key]:
    """Every trial key by its dotted name, in the order of TrialSpec.

    >>> trial_keys()["lora.rank"].default
    4
    """
    return {key.name: key for key in _keys(TrialSpec, "") if key.name != "classnames"}


def from_flat(flat: dict[str, Any], refs: dict[str, Ref], classnames: tuple[str, ...]) -> TrialSpec:
    """A TrialSpec from dotted keys; keys that are left out keep their defaults.

    Args:
        flat: dotted key -> validated value; `lora: None` turns LoRA off.
        refs: `dataset`, `backbone` and `generator` resolved to content.
        classnames: of the dataset.
    """
    nested: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for name, value in flat.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            plain[head] = value
    for head, values in nested.items():
        if head not in plain:
            plain[head] = _settings_classes()[head](**values)
    return TrialSpec(**{**plain, **refs, "classnames": classnames})


def to_flat(spec: TrialSpec) -> dict[str, Any]:
    """Dotted keys of a trial; Refs by name.

    >>> digits = Ref(name="digits", digest="d")
    >>> to_flat(TrialSpec(dataset=digits, backbone=digits, generator=digits))["lora.rank"]
    4
    """
    return dict(_flat(spec, ""))


def _keys(owner: Any, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(owner)
    for f in dataclasses.fields(owner):
        inner = _settings_class(hints[f.name])
        if inner is Ref:
            yield Key(name=prefix + f.name, type=str, default=None, limits={}, help=REFS[f.name])
        elif inner is not None:
            if type(None) in typing.get_args(hints[f.name]):
                text = f"null: no {f.name}"
                yield Key(name=f.name, type=type(None), default=f.default, limits={}, help=text)
            yield from _keys(inner, f"{prefix}{f.name}.")
        else:
            yield Key(
                name=prefix + f.name,
                type=hints[f.name],
                default=f.default,
                limits=f.metadata.get("limits", {}),
                help=f.metadata.get("help", ""),
            )


REFS = {
    "dataset": "target images, by name",
    "backbone": "CLIP: tiny, or an open_clip folder",
    "generator": "tiny, a diffusers folder, or folder:<path> of ready images",
}


@cache
def _settings_classes() -> dict[str, Any]:  # evaluating annotations is slow
    hints = typing.get_type_hints(TrialSpec)
    return {name: _settings_class(hint) for name, hint in hints.items()}


def _settings_class(hint: Any) -> Any:
    """The dataclass inside an annotation, through `| None`; None if there is none."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    return next((o for o in options if dataclasses.is_dataclass(o)), None)


def _flat(spec: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(spec):
        value = getattr(spec, f.name)
        if f.name == "classnames":
            continue
        if isinstance(value, Ref):
            yield prefix + f.name, value.name
        elif dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value
