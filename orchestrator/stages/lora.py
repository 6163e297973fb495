"""LoRA adapters of a diffusion model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from air_core.settings import LoraTraining, Ref
from air_core.tools.captions import text_of
from orchestrator.keys import Indices, Needed, StageSpec
from orchestrator.stages.context import Opened, WorkerContext, ignore
from orchestrator.stages.dataset_text import read_dataset_text
from orchestrator.stages.inputs import images_folder
from orchestrator.stages.labels import LabelsSpec
from orchestrator.store.artifacts import Artifact
from orchestrator.store.checkpoints import (
    Checkpoint,
    delete_checkpoint,
    read_checkpoint,
    write_checkpoint,
)

CHECKPOINT_INTERVAL = 120.0  # seconds between two checkpoints of a LoRA


@dataclass(frozen=True, kw_only=True)
class LoraSpec(StageSpec):
    """A LoRA of a diffusion model."""

    stage, title, process, guess, counts = "lora", "LoRA", "generator", 0.15, "steps"
    modules = ("air_core.diffusion.folder", "air_core.diffusion.lora")

    labels: LabelsSpec
    model: Ref
    training: LoraTraining
    size: int
    classes: int = field(default=0, compare=False)  # of the dataset; not in the key

    @property
    def words(self) -> list[str]:
        return [self.labels.slug, f"r{self.training.rank}"]

    def inputs(self, classes: Indices) -> Iterator[Needed]:
        yield Needed(self.labels)

    def work(self) -> tuple[str, float]:
        """A unit is a training step."""
        settings = self.labels.settings
        # A class may turn out to have fewer than `k` images.
        whole_pool = self.labels.split.pool_size if settings.kind == "pool" else None
        steps = self.training.steps_on(whole_pool or settings.k * self.classes)
        return f"{self.model.name} {self.size}px batch {self.training.batch}", steps


def build(
    spec: LoraSpec, worker: WorkerContext, report: Callable[[int, int], None] = ignore
) -> Artifact:
    """Train the LoRA adapters of a diffusion model on pseudo-labelled pool images.

    Args:
        report: called with the step and the number of all steps.
    """
    from air_core.diffusion.lora import LoraState, square, train_lora

    saved, store = time.monotonic(), worker.store

    def write(folder: Path) -> dict[str, Any]:
        labels = store.get(spec.labels)
        selected = load_file(labels.path / "labels.safetensors")
        index = selected["index"].tolist()
        classnames = read_dataset_text(spec.labels.features, store).classnames
        texts = spec.training.caption
        pairs = zip(index, selected["labels"], strict=True)
        begun = read_checkpoint(spec, store)
        with worker.unchanged_examples(spec.labels.features.dataset) as examples:
            return train_lora(
                Opened(index, lambda position: square(examples.images[position], spec.size)),
                [text_of(texts, classnames[c], i) for i, c in pairs],
                images_folder(spec.model.name),
                spec.training,
                spec.size,
                folder,
                device=worker.device,
                thrift=worker.thrift,
                report=save_and_report,
                resume_from=LoraState(begun.arrays, begun.curves["loss"]) if begun.arrays else None,
            )

    def save_and_report(step: int, steps: int, state: Callable[[], LoraState]) -> None:
        nonlocal saved
        if time.monotonic() - saved >= CHECKPOINT_INTERVAL:
            now = state()
            write_checkpoint(spec, store, Checkpoint(now.arrays, {"loss": now.losses}))
            saved = time.monotonic()
        report(step, steps)

    artifact = store.get_or_build(spec, write)
    delete_checkpoint(spec, store)
    return artifact
