"""Features of synthetic images: a row like that of the images, made together with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from air_core.settings import ClipPrecision, Level, Ref
from air_core.tools.seal import BLANK, sealed
from orchestrator.errors import MissingArtifact
from orchestrator.keys import Indices, Needed, RowSpec, StageSpec
from orchestrator.stages.context import WorkerContext, exclusive_shard
from orchestrator.stages.images import (
    FolderImages,
    GeneratedImages,
    draw_block,
    publish,
    stored_block,
)
from orchestrator.store import ArtifactStore

if TYPE_CHECKING:
    from torch import Tensor

    from air_core.diffusion import ImageGenerator
    from air_core.types import Labelled


@dataclass(frozen=True, kw_only=True)
class SyntheticFeaturesSpec(RowSpec):
    """Features of synthetic images, encoded by a frozen CLIP: a row like that of the images."""

    stage, title, process, shard = "synthetic", "image features", "encoder", ".safetensors"
    modules = (
        "air_core.backbone",
        "air_core.backbone.loading",
        "air_core.datasets.images",
        "air_core.models.tokens",
        "air_core.types",
    )

    images: GeneratedImages | FolderImages
    backbone: Ref
    precision: ClipPrecision = "fp32"
    level: Level = "features"

    @property
    def words(self) -> list[str]:
        tokens = ["tokens"] if self.level == "tokens" else []
        return [self.images.slug, self.backbone.name, *tokens]

    @property
    def block_size(self) -> int:
        return self.images.block_size

    @property
    def rows(self) -> tuple[RowSpec, ...]:
        return self.images, self

    @property
    def maker(self) -> StageSpec:
        return self.images

    def inputs(self, classes: Indices) -> Iterator[Needed]:
        yield from self.images.inputs(classes)

    def name_of(self, index: int) -> str:
        return self.images.classnames[index]

    def work(self) -> tuple[str, float]:
        return self.images.work()


def open_model(spec: SyntheticFeaturesSpec, worker: WorkerContext) -> ImageGenerator:
    """The generator of the images of a row, with the CLIP loaded that encodes them."""
    generator = spec.images.open(worker)
    worker.backbone(spec.backbone, spec.precision)
    return generator


def build(
    spec: SyntheticFeaturesSpec,
    class_index: int,
    block: int,
    worker: WorkerContext,
    generator: Callable[[], ImageGenerator],
) -> dict[str, Any]:
    """Draw one block of one class and encode it, unless the store has it.

    A block is one batch of fixed size. An image that is blank after all attempts of `draw` is
    recorded as a hole. A lock serialises processes that need the same block, such as those of two
    sweeps; the second finds the block in the store.

    Returns:
        Numbers of drawn images, redrawn images and holes, all 0 if the store had the images, and
        the seconds of drawing and encoding on the device.

    Raises:
        RuntimeError: the block has killed the last processes that drew it.
    """
    row, features = worker.store.open_row(spec.images), worker.store.open_row(spec)
    shard = (class_index, block)
    with exclusive_shard(row, *shard, worker.store) as has_images:
        counts: dict[str, Any] = {"drawn": 0, "redrawn": 0, "holes": 0, "on_device": 0.0}
        encoded_before = features.has_shard(*shard)
        drawn = None
        with ThreadPoolExecutor(1) as writer:  # while CLIP encodes the images, they are written
            writing: list[Future[None]] = []
            if not has_images:
                drawn, counts = draw_block(spec.images, *shard, generator())
                writing.append(writer.submit(publish, row, spec.images, *shard, drawn))
            if not encoded_before:
                images, ok = (
                    stored_block(row.read(*shard)) if drawn is None else (drawn.images, drawn.ok)
                )
                started = time.monotonic()
                arrays = {"features": worker.encode(images, spec), "ok": np.array(ok)}
                counts["on_device"] += time.monotonic() - started
        for written in writing:
            written.result()
        if not encoded_before:
            features.publish(*shard, sealed(save(arrays, {"seal": BLANK})))
        return counts


def read_synthetic(
    spec: SyntheticFeaturesSpec,
    count: int,
    store: ArtifactStore,
    classes: Sequence[int] | None = None,
    tokens: SyntheticFeaturesSpec | None = None,
) -> Labelled:
    """Read the first `count` images of each class, sorted by class, without holes.

    Args:
        classes: indices of classes to read; None: all.
        tokens: the row with their patch tokens, if they are needed too.

    Raises:
        MissingArtifact: the images are not drawn yet.
        DamagedArtifact: a shard is damaged.
    """
    from air_core.types import Encoded, Labelled

    features, labels = _read_row(spec, count, store, classes)
    patches = None if tokens is None else _read_row(tokens, count, store, classes)[0]
    return Labelled(Encoded(features, patches), labels)


def _read_row(
    spec: SyntheticFeaturesSpec,
    count: int,
    store: ArtifactStore,
    classes: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    import torch

    size, names = spec.images.block_size, spec.images.classnames
    drawn = range(len(names)) if classes is None else classes
    shards = [(c, block) for c in drawn for block in range(spec.blocks(count))]
    features, labels = [], []
    try:
        for c, indices, images in read_blocks(spec, shards, store):
            kept = sum(index < count for index in indices)
            features.append(images[:kept])
            labels.append(torch.full((kept,), c))
    except FileNotFoundError:
        c, block = shards[len(features)]
        raise MissingArtifact(
            f"image {block * size} of {names[c]!r} is not in {store.row(spec).key} under "
            f"{store.name}; run `airsweep run SPEC --prepare` first"
        ) from None
    return torch.cat(features), torch.cat(labels)


def read_blocks(
    spec: SyntheticFeaturesSpec, shards: Sequence[tuple[int, int]], store: ArtifactStore
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Read class, indices (B,) and features (B, D) of some blocks, without holes."""
    import torch

    row = store.row(spec)
    row.pull(shards)
    for c, block in shards:
        arrays = load(row.read(c, block))
        ok = np.flatnonzero(arrays["ok"])
        indices = block * spec.images.block_size + ok
        yield c, indices.tolist(), torch.from_numpy(arrays["features"][ok])


def drawn_blocks(
    spec: SyntheticFeaturesSpec, store: ArtifactStore
) -> Iterator[tuple[int, list[int], Tensor]]:
    """As `read_blocks`, of all blocks in the store."""
    return read_blocks(spec, sorted(store.row(spec).existing_shards()), store)


def recognised_share(spec: SyntheticFeaturesSpec, worker: WorkerContext, template: str) -> float:
    """Share of all drawn images that zero-shot CLIP assigns to the class they were drawn for."""
    from air_core.classifiers import text_classifier
    from air_core.types import Encoded

    backbone = worker.backbone(spec.backbone, spec.precision)
    text = text_classifier(backbone, spec.images.classnames, template)
    right = total = 0
    for c, indices, features in drawn_blocks(spec, worker.store):
        right += int((text.logits(Encoded(features)).argmax(dim=-1) == c).sum())
        total += len(indices)
    return right / max(total, 1)
