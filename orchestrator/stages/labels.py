"""Images that a LoRA is trained on, with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from air_core.settings import InitialLabelsSettings, LoraSource, SplitSettings
from orchestrator.keys import Indices, Needed, StageSpec
from orchestrator.stages.context import WorkerContext, ignore
from orchestrator.stages.features import FeaturesSpec, known_accuracy, read_target
from orchestrator.store.artifacts import Artifact


@dataclass(frozen=True, kw_only=True)
class LabelsSpec(StageSpec):
    """Images that a LoRA is trained on, with their labels: zero-shot CLIP labels the pool."""

    stage, title = "labels", "pseudo-labels"
    modules = (
        "air_core.backbone.loading",
        "air_core.diffusion.lora_labels",
        "air_core.models.tokens",
        "air_core.paradigms",
    )

    features: FeaturesSpec
    split: SplitSettings
    settings: InitialLabelsSettings
    source: LoraSource = "all"
    drawn: bool = False  # labelled images in random order, not in that of the files

    @property
    def words(self) -> list[str]:
        paradigm = [] if self.split.paradigm == "ul" else [self.split.paradigm]
        return [self.features.dataset.name, f"split{self.split.split_seed}", *paradigm]

    def inputs(self, classes: Indices) -> Iterator[Needed]:
        yield Needed(self.features)

    def work(self) -> tuple[str, float]:
        return self.features.backbone.name, 1


def build(
    spec: LabelsSpec, worker: WorkerContext, report: Callable[[int, int], None] = ignore
) -> Artifact:
    """Select the images that a LoRA is trained on: pseudo-labelled and labelled ones."""
    from air_core.classifiers import text_classifier
    from air_core.diffusion.lora_labels import lora_images

    def write(folder: Path) -> dict[str, Any]:
        target = read_target(spec.features, spec.split, worker.store)
        dataset, split = target.text, target.split
        backbone = worker.backbone(spec.features.backbone, spec.features.precision)
        text = text_classifier(backbone, dataset.classnames, dataset.template)
        index, labels = lora_images(
            text,
            target.batch(split.pool),
            target.labelled(split.labelled) if len(split.labelled) else None,
            split,
            spec.settings,
            spec.source,
            spec.split.split_seed if spec.drawn else None,
            target.labels[split.pool] if spec.settings.true_share is not None else None,
        )
        save_file({"index": index.numpy(), "labels": labels.numpy()}, folder / "labels.safetensors")
        # The record contains the accuracy; nothing else reads these true labels.
        right = known_accuracy(labels, target.labels[index])
        return {"images": len(index)} | ({} if right is None else {"accuracy": right})

    return worker.store.get_or_build(spec, write)
