"""Trials: their spec, with the specs of all artifacts that a trial reads.

`orchestrator.stages.trial_run` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from air_core.settings import LoraSettings, Ref, TrialSettings
from air_core.settings.components import BACKBONES, DATASETS, GENERATORS, computed_from_registries
from air_core.settings.conditions import (
    fills_bank,
    has_context,
    is_folder,
    reads_tokens,
    trains_on_synthetic,
    uses_evidence,
    uses_generator,
    uses_images,
)
from air_core.settings.flat import fields_of
from air_core.settings.normal import normalised, used_components
from orchestrator.keys import CodeVersions, Indices, Needed, StageSpec, derived
from orchestrator.stages.evidence import EvidenceSpec
from orchestrator.stages.features import FeaturesSpec
from orchestrator.stages.images import FolderImages, GeneratedImages
from orchestrator.stages.labels import LabelsSpec
from orchestrator.stages.lora import LoraSpec
from orchestrator.stages.synthetic import SyntheticFeaturesSpec


@dataclass(frozen=True, kw_only=True)
class TrialSpec(TrialSettings, StageSpec):
    """One trial: its settings, and what follows from its inputs and from the installed code."""

    stage, title, process = "trials", "trials", "trial"
    modules = ("air_core.tools.arithmetic", "air_core.models.tokens", "air_core.side_by_side")

    classnames: tuple[str, ...] = derived(())  # of the dataset
    versions: CodeVersions = derived(())
    scored_images: int = derived(0)  # pool images that the evidence scores

    @property
    def words(self) -> list[str]:
        other = ["on", self.test_dataset.name] if self.test_dataset else []
        return [self.dataset.name, self.paradigm, self.modality, f"s{self.seed}", *other]

    @property
    def normal(self) -> TrialSpec:
        return _normal(self)

    def inputs(self, classes: Indices) -> Iterator[Needed]:
        drawn, draws = self.images_per_class, tuple(range(self.evidence.draws))
        read: tuple[tuple[StageSpec | None, int, Indices], ...] = (
            (self.features, 0, ()),
            (self.tokens, 0, ()),
            (self.test_features, 0, ()),
            (self.test_tokens, 0, ()),
            (self.synthetic_features, drawn, classes),
            (self.lora_labels, 0, ()),
            (self.evidence_errors, self.scored_images, draws),
            (self.synthetic_tokens, drawn, classes),
        )
        return (Needed(spec, images, of) for spec, images, of in read if spec is not None)

    @property
    def in_key(self) -> Sequence[StageSpec]:
        return [needed.spec for needed in self.inputs(())]

    def code_of(self, *parts: str) -> str:
        """Versions of these parts of the code; empty where they are those of the recipes."""
        versions = dict(self.versions)
        return "+".join(versions[part] for part in parts if part in versions)

    @property
    def features(self) -> FeaturesSpec:
        return self._features_of(self.dataset)

    @property
    def tokens(self) -> FeaturesSpec | None:
        """None: the trial reads no image tokens."""
        return replace(self.features, level="tokens") if reads_tokens(self) else None

    @property
    def test_features(self) -> FeaturesSpec | None:
        """Features of `test_dataset`; None: the prompt is tested on `dataset`."""
        return self._features_of(self.test_dataset) if self.test_dataset else None

    @property
    def test_tokens(self) -> FeaturesSpec | None:
        features = self.test_features if reads_tokens(self) else None
        return replace(features, level="tokens") if features else None

    def _features_of(self, dataset: Ref) -> FeaturesSpec:
        backbone = self.backbone
        parts = "features", reader_of(dataset.name), BACKBONES.part(backbone.name)
        return FeaturesSpec(
            dataset=dataset,
            backbone=backbone,
            precision=self.precision,
            code=self.code_of(*parts),
        )

    @property
    def lora_adapter(self) -> LoraSpec | None:
        """None: LoRA is off, or no diffusion model is used."""
        if self.lora is None or is_folder(self.generator) or not uses_generator(self):
            return None
        return LoraSpec(
            labels=self._labels(self.lora),
            model=self.generator,
            training=self.lora.training(),
            size=self.generation.size,
            classes=len(self.classnames),
            code=self.code_of("lora", self._family),
        )

    @property
    def lora_labels(self) -> LabelsSpec | None:
        """Images that a LoRA is trained on, if the trial reads them in place of synthetic ones."""
        if self.images_from != "lora_images" or not fills_bank(self):
            return None
        return self._labels(self.lora or LoraSettings())

    def _labels(self, lora: LoraSettings) -> LabelsSpec:
        few = self.paradigm == "ssl" and self.shots > self.initial_labels.k
        return LabelsSpec(
            features=self.features,
            split=self.split,
            settings=self.initial_labels,
            source="all" if self.paradigm == "ul" else lora.source,
            drawn=lora.source != "pseudo" and (self.paradigm == "trzsl" or few),
            code=self.code_of("labels"),
        )

    @property
    def images(self) -> GeneratedImages | FolderImages | None:
        """The row of synthetic images that the trial reads; None: it reads none."""
        if not uses_images(self):
            return None
        if is_folder(self.generator):
            return FolderImages(
                model=self.generator,
                classnames=self.classnames,
                size=self.generation.size,
                block=self.generation.block,
                code=self.code_of("images"),
            )
        parts = "images", GENERATORS.part(self.generator.name), self._family
        return GeneratedImages(
            model=self.generator,
            classnames=self.classnames,
            lora=self.lora_adapter,
            lora_scale=self.lora.scale if self.lora else 1.0,
            settings=self.generation,
            code=self.code_of(*parts),
        )

    @property
    def synthetic_features(self) -> SyntheticFeaturesSpec | None:
        images = self.images
        if images is None:
            return None
        return SyntheticFeaturesSpec(
            images=images,
            backbone=self.backbone,
            precision=self.precision,
            code=self.code_of("synthetic", BACKBONES.part(self.backbone.name)),
        )

    @property
    def synthetic_tokens(self) -> SyntheticFeaturesSpec | None:
        """None: the trial reads no tokens of synthetic images."""
        row = self.synthetic_features if reads_tokens(self) and trains_on_synthetic(self) else None
        return replace(row, level="tokens") if row else None

    @property
    def base_features(self) -> SyntheticFeaturesSpec | None:
        """The row of images without LoRA, for comparison; None: there is no LoRA."""
        return None if self.lora_adapter is None else replace(self, lora=None).synthetic_features

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
            code=self.code_of("evidence", self._family),
        )

    @property
    def _family(self) -> str:
        """The part of the code that reads the generator's inputs."""
        return f"family:{self.generator.kind}"


@computed_from_registries
@lru_cache(maxsize=4096)  # a plan needs the key of each trial several times
def _normal(spec: TrialSpec) -> TrialSpec:
    """The normalised trial, with the version of the code that computes it."""
    spec = normalised(spec)
    components = (registry.part(name) for registry, name in used_components(spec))
    return replace(spec, code=spec.code_of("trials", *components))


def reader_of(dataset: str) -> str:
    """The part of the code that reads a dataset: the module of its name in `air_core.datasets`,
    or a plugin.

    >>> reader_of("cub"), reader_of("folder:/data/birds")
    ('datasets.cub', 'datasets.image_folder')
    """
    if dataset in DATASETS and DATASETS[dataset].source:
        return DATASETS.part(dataset)
    return "datasets.image_folder" if ":" in dataset else f"datasets.{dataset}"


def trial_of(
    flat: Mapping[str, Any],
    refs: Mapping[str, Ref],
    classnames: tuple[str, ...] = (),
    versions: CodeVersions = (),
) -> TrialSpec:
    """The trial of dotted keys, as `air_core.settings.flat.from_flat`."""
    settings = {**fields_of(flat), **refs}
    return TrialSpec(**settings, classnames=classnames, versions=versions)


# Class texts in one pass. Each keeps 1 to 2 MB for the gradient with ViT-B/32, and beyond these
# numbers the time depends on the arithmetic, so that more bring nothing.
MAX_TEXTS = {"cpu": 256, "cuda": 1024}


def side_by_side(
    specs: Sequence[TrialSpec], device: str, share: float = 1.0
) -> list[list[TrialSpec]]:
    """Groups of trials whose prompts stand before the same class names in the same text tower.

    Other trials are alone: other learners have no such pass to share, and a transfer trial trains
    nothing itself.

    Args:
        share: of the usual number of class texts in a group, for a device short of memory.
    """
    groups: dict[object, list[TrialSpec]] = {}
    for spec in specs:
        alone = not has_context(spec) or spec.test_dataset is not None
        shared = (spec.dataset, spec.backbone, spec.precision, spec.prompt.length)
        groups.setdefault(spec if alone else shared, []).append(spec)
    parts = []
    for group in groups.values():
        texts = MAX_TEXTS["cpu" if device == "cpu" else "cuda"]
        size = max(1, int(texts * share) // max(1, len(group[0].classnames)))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts
