"""Where stages and trials work: store, data, device, and the CLIP that encodes images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from orchestrator.planning import Resolver
from orchestrator.planning.resources import memory_fraction
from orchestrator.spec.sweep import ENCODER_BATCH
from orchestrator.store import ArtifactStore

CHANGED = (
    "has changed since the run was planned: its files are not those of the planned digest; wait "
    "until nothing writes there and run again, which takes the content that is there then"
)


class ChangedInput(ValueError):
    """The files of a dataset are not those that its digest was taken of."""


@dataclass(frozen=True)
class WorkerContext:
    """One place to work at."""

    store: ArtifactStore
    data_root: Path | None = None
    device: str = "cpu"
    batch: int = ENCODER_BATCH

    def with_less(self, halvings: int) -> WorkerContext:
        """The same with fewer images at a time, for a device that ran out of memory."""
        return replace(self, batch=max(1, self.batch >> halvings))

    def examples(self, dataset: Ref) -> Examples:
        """
        Raises:
            ChangedInput: the dataset's files are not those that its digest was taken of.
        """
        return _examples(dataset, self._digests, self.data_root)

    @contextmanager
    def reading(self, dataset: Ref) -> Iterator[Examples]:
        """Examples whose images were the same before and after the block. Raises as `examples`."""
        examples = self.examples(dataset)
        try:
            yield examples
        finally:  # a file that was removed meanwhile is an error of its own inside the block
            _check_content(dataset, self._digests, self.data_root)

    def check_ready_images(self, folder: Ref) -> None:
        """
        Raises:
            ChangedInput: the images of a `folder:` generator are not those of its digest.
        """
        resolver = _resolver(self._digests, self.data_root)
        _check_same(folder, lambda: resolver.weights_content("generator", folder.name))

    @property
    def _digests(self) -> Path:
        return self.store.root / "digests.json"

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
def _examples(dataset: Ref, digests: Path, data_root: Path | None) -> Examples:
    _check_content(dataset, digests, data_root)
    return get_dataset(dataset.name).load(data_root)


def _check_content(dataset: Ref, digests: Path, data_root: Path | None) -> None:
    resolver = _resolver(digests, data_root)
    _check_same(dataset, lambda: resolver.content(get_dataset(dataset.name)))


def _check_same(planned: Ref, look: Callable[[], Ref]) -> None:
    try:
        here = look()
    except ValueError as problem:  # a folder has no images any more, say
        raise ChangedInput(f"{planned.name} {CHANGED} ({problem})") from None
    if here.digest != planned.digest:
        raise ChangedInput(f"{planned.name} {CHANGED}")


@cache
def _resolver(digests: Path, data_root: Path | None) -> Resolver:
    return Resolver(digests, data_root)


@cache
def _backbone(name: str, device: str, precision: str) -> Backbone:
    return load_backbone(name, device, precision)
