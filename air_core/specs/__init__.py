"""Settings and specs of all stages, as frozen dataclasses. Imports the standard library only.

`*Settings` are what a user sets. A `*Spec` is everything that a stage may read: its own settings
and the complete specs of the stages that it depends on. So the nesting of specs is the dependency
graph, and a stage cannot depend on a setting that is not in its key. Specs contain nothing about
machines.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, replace
from itertools import product
from pathlib import PurePath
from typing import Any, ClassVar, Literal, NamedTuple

from air_core.components import (
    AUXILIARIES,
    BACKBONES,
    DATASETS,
    FIDELITIES,
    GENERATORS,
    LEARNERS,
    LOSSES,
    STRATEGIES,
    TRANSDUCTIONS,
    Own,
    Registry,
)
from air_core.specs.conditions import (
    draws_images,
    fills_bank,
    is_folder,
    labelled_lora,
    labelled_only,
    reads_lora,
    reads_tokens,
    selects_images,
    selects_real_images,
    trains_on_synthetic,
    uses_auxiliary,
    uses_evidence,
    uses_generator,
    uses_images,
)


def knob(default: Any, help: str, **facts: Any) -> Any:
    """A settings field with a default and one line of help.

    Args:
        facts: limits (ge, gt, le, lt); `used_if`, a condition on the TrialSpec without which the
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
    """A field of TrialSpec with settings; `used_if` is for all of them."""
    return field(default=default, metadata=facts)


def _only(kind: Any, settings: Any) -> Any:
    """The part of settings that their base class `kind` declares."""
    return kind(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(kind)})


# Parts of the code with their versions, where these are not those of the recipes: see
# orchestrator.store.code_version. The spec of a single stage has the versions without the parts.
CodeVersions = tuple[tuple[str, str], ...]


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

MAX_IMAGES = 1_000_000  # of a class


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
        None, "largest number of pool images, a subset drawn by split_seed; null: all", ge=1
    )
    pool_ratio: float = knob(
        1.0, "simulated imbalance: images of the commonest class over those of the rarest", ge=1
    )
    pool_missing: float = knob(
        0.0, "simulated: share of the classes without any pool image", ge=0, lt=1
    )
    labelled_size: int | None = knob(
        None,
        "trzsl: largest number of labelled images, a subset drawn by split_seed; null: all; a "
        "sweep that does not set it uses pool_size",
        ge=1,
        used_if=lambda s: s.paradigm == "trzsl",
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
LORA_SOURCE = "training images where some have labels: all, pseudo or labelled"


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
    source: LoraSource = knob("all", LORA_SOURCE, used_if=lambda s: s.paradigm != "ul")

    def training(self) -> LoraTraining:
        part: LoraTraining = _only(LoraTraining, self)
        return part


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Generation of images; every setting is in the key of the images."""

    seed: int = knob(0, "changes every image", ge=0, used_if=draws_images)
    template: Templates = knob(
        "a photo of a {}",
        "prompt, with one {} for the class name" + SEVERAL,
        used_if=draws_images,
    )
    guidance_scale: float = knob(7.5, "classifier-free guidance", ge=0, used_if=draws_images)
    num_inference_steps: int = knob(25, "denoising steps", ge=1, used_if=draws_images)
    size: int = knob(512, "side of the square image, in pixels", ge=8)
    # Pixels depend on the composition of a batch, so a block is one batch and part of the key.
    block: int = knob(
        8,
        "images of one class that are generated together",
        ge=1,
        used_if=uses_images,
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
    temperature: Literal["match_entropy", "logit_scale", "kappa"] = knob(
        "match_entropy", "match_entropy: same confidence on the pool as the text classifier"
    )
    kappa: float = knob(
        100.0,
        "with temperature: kappa, the factor on cosines",
        gt=0,
        used_if=lambda s: s.auxiliary.temperature == "kappa",
    )
    neighbours: int = knob(16, "knn: nearest images per class that are averaged", ge=1)
    rounds: int = knob(
        1,
        "selections of real images in each iteration",
        ge=1,
        used_if=selects_real_images,
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
    init: Literal["normal", "uniform"] = knob(
        "normal", "visual: initial distribution of the tokens"
    )
    restart: bool = knob(
        True, "each iteration starts from the same prompt", used_if=lambda s: s.iterations > 1
    )
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

    draws: int = knob(
        0,
        "draws of noise per image and class; 0: no evidence",
        ge=0,
        le=1000,
    )
    images: int | None = knob(
        None,
        "pool images that are scored, a random sample; null: all of the pool",
        ge=1,
    )
    weight: float = knob(
        0.3,
        "share of the evidence in the scores of the pool",
        ge=0,
        le=1,
    )
    schedule: Literal["fixed", "annealed"] = knob(
        "fixed",
        "annealed: the weight falls linearly to 0 over the iterations",
        used_if=lambda s: s.iterations > 1,
    )
    confidence: float = knob(
        0.8,
        "mean largest probability of the evidence",
        gt=0,
        lt=1,
    )
    balance: Literal["none", "sinkhorn"] = knob(
        "none",
        "sinkhorn: all classes get the same share of the pool",
    )

    def scoring(self) -> EvidenceScoring:
        part: EvidenceScoring = _only(EvidenceScoring, self)
        return part


ImagesFrom = Literal["generator", "lora_images", "true_labels", "shifted_labels"]
IMAGES_FROM = (
    "lora_images: the images that the LoRA is trained on (control); bounds: true_labels: pool "
    "images under their true labels; shifted_labels: synthetic ones, each as the next class"
)


# ---------------------------------------------------------------- specs of the stages

# Modules of air_core that several stages use. Their code is part of keys: see StageSpec.modules.
_CLIP = (
    "air_core.ahead",
    "air_core.arithmetic",
    "air_core.backbone",
    "air_core.backbone.blocks",
    "air_core.backbone.clip",
    "air_core.backbone.text",
    "air_core.backbone.vision",
    "air_core.models.tokens",
    "air_core.types",
)
_LOADED_CLIP = (*_CLIP, "air_core.backbone.loading")
_IMAGES = ("air_core.datasets.images", "air_core.datasets.class_folders")
_DRAWING = (
    *_IMAGES,
    "air_core.arithmetic",
    "air_core.captions",
    "air_core.diffusion",
    "air_core.diffusion.denoiser",
    "air_core.diffusion.folder",
    "air_core.diffusion.loading",
    "air_core.diffusion.noise",
    "air_core.diffusion.pipeline",
)
_SCORING = (
    "air_core.chunks",
    "air_core.classifiers",
    "air_core.datasets.stratified",
    "air_core.paradigms",
)

Classes = tuple[int, ...]  # indices
Process = Literal["encoder", "generator", "trial"]


def own_name(name: str) -> str:
    """The name of a dataset or model; of a path, that of the folder alone.

    >>> [own_name(name) for name in ("digits", "folder:/tmp/photos", "../sd15", "ViT-B-32/openai")]
    ['digits', 'photos', 'sd15', 'ViT-B-32/openai']
    """
    path = PurePath(name.removeprefix("folder:"))
    is_path = name.startswith(("folder:", "/", ".", "~"))
    return (is_path and path.name.strip(".")) or name


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """Base of the specs of all stages; its class variables are the facts of a stage.

    `orchestrator.stages.<stage>` makes its artifacts.
    """

    stage: ClassVar[str]  # folder in the store
    # Raise it when the stage's code gives another result for the same spec, and run `make golden`.
    # The keys of later stages change too, since they contain this number.
    recipe: ClassVar[int] = 1
    # The modules that compute it, beside readers of datasets and components.
    modules: ClassVar[tuple[str, ...]]
    title: ClassVar[str]  # of its artifacts, on screens
    process: ClassVar[Process] = "encoder"  # that makes it, as in `resources`
    guess: ClassVar[float] = 1.0  # seconds of a unit with tiny models on a CPU core
    # What the progress of an artifact, or of a shard, counts.
    counts: ClassVar[Literal["images", "steps", "pairs"]] = "images"
    shard: ClassVar[str] = ""  # suffix of the shards of a row; empty: its artifact is no row

    @property
    def slug(self) -> str:
        """A short description of the artifact; not part of its identity."""
        words = "-".join(map(own_name, self._words()))
        return re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")[:60]

    def _words(self) -> list[str]:
        raise NotImplementedError

    @property
    def rows(self) -> tuple[StageSpec, ...]:
        """Specs of the rows that are made together, shard by shard; empty: it is no row."""
        return (self,) if self.shard else ()

    @property
    def maker(self) -> StageSpec:
        """The spec whose stage makes it: its own, or that of a row made together with it."""
        return self

    @property
    def is_drawn(self) -> bool:
        """Whether generators make it, shard by shard."""
        return bool(self.shard) and self.maker.process == "generator"

    @property
    def whole(self) -> StageSpec | None:
        """The artifact that replaces a row of shards once it is complete; None: there is none."""
        return None

    def inputs(self, classes: Classes) -> Iterator[Needed]:
        """The artifacts that this one is made from.

        Args:
            classes: those of which trials read synthetic images.
        """
        yield from ()

    def work(self) -> tuple[str, float]:
        """Kind of the work, which names all that the cost of a unit depends on, and the units of
        the artifact, or of one shard."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RowSpec(StageSpec):
    """Base of rows: shards by an index, such as a class or a draw, and a block of images."""

    process: ClassVar[Process] = "generator"

    @property
    def block_size(self) -> int:
        """Images of a shard."""
        raise NotImplementedError

    def blocks(self, images: int) -> int:
        """Number of blocks that contain the first `images` images."""
        return -(-images // self.block_size)

    def shards(self, images: int, indices: Classes) -> list[tuple[int, int]]:
        """Shards as (index, block), in the order in which they are made."""
        return list(product(indices, range(self.blocks(images))))

    def name_of(self, index: int) -> str:
        """Name of an index in messages."""
        raise NotImplementedError

    @property
    def needs_earlier(self) -> bool:
        """Whether a shard can need earlier ones of its block, so that one process makes them."""
        return False


class Needed(NamedTuple):
    """An artifact that another one or a trial reads; of a row, some images of some indices."""

    spec: StageSpec
    images: int = 0  # per index; 0 except for a row
    indices: Classes = ()  # classes or draws; empty except for a row


@dataclass(frozen=True, kw_only=True)
class FeaturesSpec(StageSpec):
    """Features of every image of a dataset, encoded by a frozen CLIP.

    `level` is `features`, one vector per image, or `tokens`, those of its patches, for visual
    prompts.
    """

    stage, title, guess = "features", "CLIP features", 8.0
    modules = (
        *_LOADED_CLIP,
        *_IMAGES,
        "air_core.datasets.dataset",
        "air_core.datasets.places",
        "air_core.datasets.split_files",
        "air_core.datasets.stratified",
        "air_core.datasets.unlabelled",
    )

    dataset: Ref
    backbone: Ref
    precision: ClipPrecision = "fp32"
    level: Level = knob("features", "features or tokens")
    code: str = ""

    @property
    def encoded(self) -> EncodedSpec | None:
        """The blocks that the features of many image files are put together from."""
        row = EncodedSpec(features=self, block=EncodedSpec.size)
        return row if row.blocks(self.dataset.images) > row.few else None

    def _words(self) -> list[str]:
        tokens = ["tokens"] if self.level == "tokens" else []
        return [self.dataset.name, self.backbone.name, *tokens]

    def inputs(self, classes: Classes) -> Iterator[Needed]:
        if (row := self.encoded) is not None:
            yield Needed(row, self.dataset.images, (0,))

    def work(self) -> tuple[str, float]:
        blocks = "" if self.encoded is None else " of blocks"
        return f"{self.dataset.name} {self.backbone.name} {self.level}{blocks}", 1


@dataclass(frozen=True, kw_only=True)
class EncodedSpec(RowSpec):
    """Blocks of the features of a dataset with many image files: a row with one index.

    Encoders make them side by side. Complete features replace them.
    """

    stage, title, process = "encoded", "CLIP feature blocks", "encoder"
    guess, shard = 0.005, ".safetensors"
    modules = FeaturesSpec.modules
    # Images of a block. A multiple of the images between two batches that start anew
    # (`orchestrator.stages.encoded.CHUNK`), so that blocks do not change the batches.
    size: ClassVar[int] = 1024
    few: ClassVar[int] = 4  # blocks that one process encodes, since a pool takes seconds to start

    features: FeaturesSpec
    block: int

    def _words(self) -> list[str]:
        return [self.features.slug]

    @property
    def block_size(self) -> int:
        return self.block

    @property
    def whole(self) -> StageSpec:
        return self.features

    def name_of(self, index: int) -> str:
        return self.features.dataset.name

    def work(self) -> tuple[str, float]:
        """A unit is an image."""
        return f"{self.features.backbone.name} {self.features.level}", self.block


@dataclass(frozen=True, kw_only=True)
class LabelsSpec(StageSpec):
    """Images that a LoRA is trained on, with their labels: zero-shot CLIP labels the pool."""

    stage, title = "labels", "pseudo-labels"
    modules = (
        *_LOADED_CLIP,
        *_SCORING,
        "air_core.lora_labels",
        "air_core.pseudo_labels.top_k",
    )

    features: FeaturesSpec
    split: SplitSettings
    settings: InitialLabelsSettings
    source: LoraSource = knob("all", LORA_SOURCE)
    drawn: bool = False  # labelled images in random order, not in that of the files
    code: str = ""

    def _words(self) -> list[str]:
        paradigm = [] if self.split.paradigm == "ul" else [self.split.paradigm]
        return [self.features.dataset.name, f"split{self.split.split_seed}", *paradigm]

    def inputs(self, classes: Classes) -> Iterator[Needed]:
        yield Needed(self.features)

    def work(self) -> tuple[str, float]:
        return self.features.backbone.name, 1


@dataclass(frozen=True, kw_only=True)
class LoraSpec(StageSpec):
    """A LoRA of a diffusion model."""

    stage, title, process, guess, counts = "lora", "LoRA", "generator", 0.15, "steps"
    modules = (*_DRAWING, "air_core.ahead", "air_core.diffusion.lora")

    labels: LabelsSpec
    model: Ref
    training: LoraTraining
    size: int
    classes: int = field(default=0, compare=False)  # of the dataset; not in the key
    code: str = ""

    def _words(self) -> list[str]:
        return [self.labels.slug, f"r{self.training.rank}"]

    def inputs(self, classes: Classes) -> Iterator[Needed]:
        yield Needed(self.labels)

    def work(self) -> tuple[str, float]:
        """A unit is a training step."""
        settings = self.labels.settings
        # A class may turn out to have fewer than `k` images.
        whole_pool = self.labels.split.pool_size if settings.kind == "pool" else None
        steps = self.training.steps_on(whole_pool or settings.k * self.classes)
        return f"{self.model.name} {self.size}px batch {self.training.batch}", steps


@dataclass(frozen=True, kw_only=True)
class ImagesSpec(RowSpec):
    """Base of both kinds of rows of images, which are one stage."""

    stage, title, guess, shard, counts = "images", "image blocks", 0.03, ".parquet", "steps"
    modules = _DRAWING


@dataclass(frozen=True, kw_only=True)
class GeneratedImages(ImagesSpec):
    """An unlimited seeded row of images for each class; the spec does not contain their number."""

    kind: Literal["generated"] = "generated"
    model: Ref
    classnames: tuple[str, ...]
    lora: LoraSpec | None
    lora_scale: float
    settings: GenerationSettings
    code: str = ""

    def _words(self) -> list[str]:
        return [self.model.name, self.lora.slug if self.lora else "base"]

    @property
    def block_size(self) -> int:
        return self.settings.block

    def inputs(self, classes: Classes) -> Iterator[Needed]:
        if self.lora is not None:
            yield Needed(self.lora)

    def work(self) -> tuple[str, float]:
        """A unit is an image."""
        drawn = self.settings
        kind = f"{self.model.name} {drawn.size}px {drawn.num_inference_steps} steps"
        return kind, self.block_size


@dataclass(frozen=True, kw_only=True)
class FolderImages(ImagesSpec):
    """Ready images, with one folder for each class."""

    kind: Literal["folder"] = "folder"
    model: Ref
    classnames: tuple[str, ...]
    size: int
    block: int
    code: str = ""

    def _words(self) -> list[str]:
        return [self.model.name]

    @property
    def block_size(self) -> int:
        return self.block

    def work(self) -> tuple[str, float]:
        return "ready images", self.block_size


@dataclass(frozen=True, kw_only=True)
class SyntheticFeaturesSpec(RowSpec):
    """Features of synthetic images, encoded by a frozen CLIP: a row like that of the images."""

    stage, title, process, shard = "synthetic", "image features", "encoder", ".safetensors"
    modules = (*_LOADED_CLIP, *_IMAGES)

    images: GeneratedImages | FolderImages
    backbone: Ref
    precision: ClipPrecision = "fp32"
    level: Level = knob("features", "features or tokens")
    code: str = ""

    def _words(self) -> list[str]:
        tokens = ["tokens"] if self.level == "tokens" else []
        return [self.images.slug, self.backbone.name, *tokens]

    @property
    def block_size(self) -> int:
        return self.images.block_size

    @property
    def rows(self) -> tuple[StageSpec, ...]:
        return self.images, self

    @property
    def maker(self) -> StageSpec:
        return self.images

    def inputs(self, classes: Classes) -> Iterator[Needed]:
        yield from self.images.inputs(classes)

    def name_of(self, index: int) -> str:
        return self.images.classnames[index]

    def work(self) -> tuple[str, float]:
        return self.images.work()


@dataclass(frozen=True, kw_only=True)
class EvidenceSpec(RowSpec):
    """Denoising errors of the pool images of a split, for each class of the pool.

    An unlimited row of draws for each block of images; the spec contains neither the number of
    draws nor that of images. The images are in a random order, so the first ones are a sample.
    """

    stage, title, guess = "evidence", "denoising errors", 0.004
    shard, counts = ".safetensors", "pairs"
    modules = (
        *_LOADED_CLIP,
        *_DRAWING,
        *_SCORING,
        "air_core.diffusion.evidence",
        "air_core.diffusion.lora",
    )

    features: FeaturesSpec
    split: SplitSettings
    model: Ref
    lora: LoraSpec | None
    lora_scale: float
    scoring: EvidenceScoring
    size: int
    code: str = ""

    def _words(self) -> list[str]:
        return [(self.lora or self.features).slug, self.model.name]

    @property
    def block_size(self) -> int:
        return self.scoring.block

    @property
    def needs_earlier(self) -> bool:
        """Images whose candidates are pruned need the errors of the first draws."""
        return self.scoring.prune_after is not None

    def shards(self, images: int, indices: Classes) -> list[tuple[int, int]]:
        """The draws of one block come one after another, since they need the same images."""
        return [(draw, block) for block in range(self.blocks(images)) for draw in indices]

    def name_of(self, index: int) -> str:
        return f"draw {index}"

    def inputs(self, classes: Classes) -> Iterator[Needed]:
        yield Needed(self.features)
        if self.lora is not None:
            yield Needed(self.lora)

    def work(self) -> tuple[str, float]:
        """A unit is an image."""
        scoring = self.scoring
        kind = f"{self.model.name} {self.size}px {self.features.dataset.name}"
        kind += f" top {scoring.top or 'all'}"
        if scoring.prune_after is not None:
            kind += f" {scoring.prune_to} after {scoring.prune_after}"
        return kind, self.block_size


@dataclass(frozen=True, kw_only=True)
class TrialSpec(StageSpec, SplitSettings):
    """One trial. `air_core.specs.flat` converts it to flat keys such as `lora.rank`."""

    stage, title, process = "trials", "trials", "trial"
    modules = (
        *_CLIP,
        *_SCORING,
        "air_core.auxiliary",
        "air_core.auxiliary.bank",
        "air_core.evaluation",
        "air_core.evidence",
        "air_core.method",
        "air_core.prompts",
        "air_core.prompts.text",
        "air_core.pseudo_labels",
        "air_core.pseudo_labels.top_k",
        "air_core.side_by_side",
        "air_core.training",
    )

    dataset: Ref
    classnames: tuple[str, ...] = ()  # of the dataset; not in the key
    code: CodeVersions = ()  # the key contains the version of the part `trials`
    scored_images: int = 0  # pool images that the evidence scores; not in the key
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
        le=MAX_IMAGES,
        used_if=fills_bank,
        unused=0,
    )
    images_from: ImagesFrom = knob("generator", IMAGES_FROM, used_if=fills_bank)
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

    def _words(self) -> list[str]:
        other = ["on", self.test_dataset.name] if self.test_dataset else []
        return [self.dataset.name, self.paradigm, self.modality, f"s{self.seed}", *other]

    def inputs(self, classes: Classes) -> Iterator[Needed]:
        read = (self.features, self.tokens, self.test_features, self.test_tokens)
        yield from (Needed(spec) for spec in read if spec is not None)
        if (row := self.synthetic_features) is not None:
            yield Needed(row, self.images_per_class, classes)
        if (labels := self.lora_labels) is not None:
            yield Needed(labels)
        if (errors := self.evidence_errors) is not None:
            yield Needed(errors, self.scored_images, tuple(range(self.evidence.draws)))
        if (tokens := self.synthetic_tokens) is not None:
            yield Needed(tokens, self.images_per_class, classes)

    # Specs of the stages that this trial depends on.

    @property
    def split(self) -> SplitSettings:
        part: SplitSettings = _only(SplitSettings, self)
        return part

    @property
    def features(self) -> FeaturesSpec:
        return self._features_of(self.dataset)

    def _features_of(self, dataset: Ref) -> FeaturesSpec:
        return FeaturesSpec(
            dataset=dataset,
            backbone=self.backbone,
            precision=self.precision,
            code=self.code_of(
                "features", reader_of(dataset.name), BACKBONES.part(self.backbone.name)
            ),
        )

    def code_of(self, *parts: str) -> str:
        """Versions of these parts of the code; empty where they are those of the recipes."""
        versions = dict(self.code)
        return "+".join(versions[part] for part in parts if part in versions)

    @property
    def tokens(self) -> FeaturesSpec | None:
        """None: the trial reads no image tokens."""
        return self._tokens_of(self.features)

    @property
    def test_features(self) -> FeaturesSpec | None:
        """Features of `test_dataset`; None: the prompt is tested on `dataset`."""
        return None if self.test_dataset is None else self._features_of(self.test_dataset)

    @property
    def test_tokens(self) -> FeaturesSpec | None:
        return self._tokens_of(self.test_features)

    def _tokens_of(self, features: FeaturesSpec | None) -> FeaturesSpec | None:
        if features is None or not reads_tokens(self):
            return None
        return replace(features, level="tokens")

    @property
    def lora_adapter(self) -> LoraSpec | None:
        """None: LoRA is off, or no diffusion model is used."""
        if self.lora is None or is_folder(self.generator) or not uses_generator(self):
            return None
        return _lora(self, self.lora)

    @property
    def images(self) -> GeneratedImages | FolderImages | None:
        """The row of synthetic images that the trial reads; None: it reads none."""
        if not uses_images(self):
            return None
        return _images(self, self.lora)

    @property
    def base_images(self) -> GeneratedImages | None:
        """The same row without LoRA, for comparison; None: there is no LoRA."""
        if self.lora_adapter is None or self.images is None:
            return None
        row = _images(self, None)
        return row if isinstance(row, GeneratedImages) else None

    @property
    def synthetic_features(self) -> SyntheticFeaturesSpec | None:
        images = self.images
        return None if images is None else _synthetic(self, images)

    @property
    def synthetic_tokens(self) -> SyntheticFeaturesSpec | None:
        """None: the trial reads no tokens of synthetic images."""
        row = self.synthetic_features
        if row is None or not reads_tokens(self) or not trains_on_synthetic(self):
            return None
        return replace(row, level="tokens")

    @property
    def lora_labels(self) -> LabelsSpec | None:
        """Images that a LoRA is trained on, if the trial reads them in place of synthetic ones."""
        if self.images_from != "lora_images" or not fills_bank(self):
            return None
        return _labels(self, self.lora or LoraSettings())

    @property
    def evidence_errors(self) -> EvidenceSpec | None:
        """None: the trial uses no evidence."""
        if not uses_evidence(self):
            return None
        return EvidenceSpec(
            features=self.features,
            split=self.split,
            model=self.generator,
            lora=self.lora_adapter,
            lora_scale=self.lora.scale if self.lora else 1.0,
            scoring=self.evidence.scoring(),
            size=self.generation.size,
            code=self.code_of("evidence", _family(self)),
        )


def reader_of(dataset: str) -> str:
    """The part of the code that reads a dataset: the module of its name in `air_core.datasets`,
    or a plugin.

    >>> reader_of("cub"), reader_of("folder:/data/birds")
    ('datasets.cub', 'datasets.image_folder')
    """
    if dataset in DATASETS and DATASETS[dataset].source:
        return DATASETS.part(dataset)
    return "datasets.image_folder" if ":" in dataset else f"datasets.{dataset}"


def _images(spec: TrialSpec, lora: LoraSettings | None) -> GeneratedImages | FolderImages:
    """The row of images with or without a LoRA."""
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
        lora=_lora(spec, lora) if lora else None,
        lora_scale=lora.scale if lora else 1.0,
        settings=spec.generation,
        code=spec.code_of("images", GENERATORS.part(spec.generator.name), _family(spec)),
    )


def _family(spec: TrialSpec) -> str:
    """The part of the code that reads the generator's inputs; see `air_core.models.families`."""
    return f"family:{spec.generator.kind}"


def _lora(spec: TrialSpec, lora: LoraSettings) -> LoraSpec:
    return LoraSpec(
        labels=_labels(spec, lora),
        model=spec.generator,
        training=lora.training(),
        size=spec.generation.size,
        classes=len(spec.classnames),
        code=spec.code_of("lora", _family(spec)),
    )


def _labels(spec: TrialSpec, lora: LoraSettings) -> LabelsSpec:
    settings = spec.initial_labels
    return LabelsSpec(
        features=spec.features,
        split=spec.split,
        settings=settings,
        source="all" if spec.paradigm == "ul" else lora.source,
        drawn=lora.source != "pseudo"
        and (spec.paradigm == "trzsl" or (spec.paradigm == "ssl" and spec.shots > settings.k)),
        code=spec.code_of("labels"),
    )


def _synthetic(spec: TrialSpec, images: GeneratedImages | FolderImages) -> SyntheticFeaturesSpec:
    return SyntheticFeaturesSpec(
        images=images,
        backbone=spec.backbone,
        precision=spec.precision,
        code=spec.code_of("synthetic", BACKBONES.part(spec.backbone.name)),
    )


STAGES: tuple[type[StageSpec], ...] = (
    EncodedSpec,
    FeaturesSpec,
    LabelsSpec,
    LoraSpec,
    ImagesSpec,
    SyntheticFeaturesSpec,
    EvidenceSpec,
    TrialSpec,
)
