"""Where stages and trials work: store, data, device, and the CLIP that encodes images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from air_core.backbone import Backbone
from air_core.backbone.loading import load_backbone
from air_core.datasets import Examples, get_dataset
from air_core.specs import FeaturesSpec, Ref, SyntheticFeaturesSpec
from orchestrator.fit import memory_fraction
from orchestrator.store import ArtifactStore
from orchestrator.sweep import ENCODER_BATCH


@dataclass(frozen=True)
class Workshop:
    """One place to work at."""

    store: ArtifactStore
    data_root: Path | None = None
    device: str = "cpu"
    batch: int = ENCODER_BATCH

    def with_less(self, halvings: int) -> Workshop:
        """The same with fewer images at a time, for a device that ran out of memory."""
        return replace(self, batch=max(1, self.batch >> halvings))

    def examples(self, dataset: Ref) -> Examples:
        return _examples(dataset.name, self.data_root)

    def backbone(self, backbone: Ref, precision: str) -> Backbone:
        found = _backbone(backbone.name, self.device, precision)
        found.at_once = self.batch
        return found

    def encoded(
        self, images: Sequence[Image.Image], spec: FeaturesSpec | SyntheticFeaturesSpec
    ) -> np.ndarray:
        """(N, D) features, or (N, T, V) tokens in half precision: they are many."""
        backbone = self.backbone(spec.backbone, spec.precision)
        if spec.level == "tokens":
            return np.asarray(backbone.image_tokens(images, torch.float16))
        return np.asarray(backbone.encode_images(images))


def keep_to_share(gpu: float) -> None:
    """Let nobody take the memory of others on its device: it fails alone, and is told why."""
    if not gpu or not torch.cuda.is_available():
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(gpu, total) or 1.0)


@contextmanager
def one_thread() -> Iterator[None]:
    """As trials compute: sums in one order, so that the same input gives the same bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _examples(name: str, data_root: Path | None) -> Examples:
    return get_dataset(name).load(data_root)


@cache
def _backbone(name: str, device: str, precision: str) -> Backbone:
    return load_backbone(name, device, precision)
