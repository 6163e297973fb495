"""Encodes the images of a dataset with a frozen CLIP; of many image files, block by block.

A shard holds the features of a block of images in the order of the dataset, and the reasons why
some of them are unreadable. When the features of the dataset are complete, its shards are removed.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from safetensors.numpy import load, save

from air_core.datasets.images import Unreadable
from air_core.tools.seal import BLANK, sealed
from orchestrator.keys import RowSpec, StageSpec
from orchestrator.stages.context import Opened, WorkerContext, exclusive_shard, ignore

if TYPE_CHECKING:
    from air_core.backbone import Backbone
    from air_core.datasets import Examples
    from orchestrator.stages.features import FeaturesSpec

READING = (
    "air_core.backbone",
    "air_core.backbone.loading",
    "air_core.types",
)
CHUNK = 512  # images after which batches start anew and progress is reported


@dataclass(frozen=True, kw_only=True)
class EncodedSpec(RowSpec):
    """Blocks of the features of a dataset with many image files: a row with one index.

    Encoders make them side by side. Complete features replace them.
    """

    stage, title, process = "encoded", "CLIP feature blocks", "encoder"
    guess, shard = 0.005, ".safetensors"
    modules = READING
    # Images of a block. A multiple of the images between two batches that start anew
    # (`CHUNK`), so that blocks do not change the batches.
    size: ClassVar[int] = 1024
    few: ClassVar[int] = 4  # blocks that one process encodes, since a pool takes seconds to start

    features: FeaturesSpec
    block: int

    @property
    def words(self) -> list[str]:
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


# Features (N, D) or tokens (N, T, V), and why images are unreadable, by position in the dataset.
Encoded = tuple[np.ndarray, dict[int, str]]


def encode(
    spec: FeaturesSpec,
    examples: Examples,
    positions: range,
    worker: WorkerContext,
    report: Callable[[int, int], None] = ignore,
) -> Encoded:
    """Encode some images of a dataset.

    Args:
        report: called with the number of finished images and of all images.
    """
    from PIL import Image

    bad: dict[int, str] = {}

    def readable(position: int) -> Image.Image:
        """The image; a blank one in place of one that is unreadable."""
        try:
            return examples.images[position]
        except Unreadable as problem:
            bad[position] = str(problem)
            return Image.new("RGB", (8, 8))

    images = Opened(positions, readable)
    prepared = worker.backbone(spec.backbone, spec.precision).prepared(images)
    rows = []
    for start in range(0, len(positions), CHUNK):
        rows.append(worker.encode(itertools.islice(prepared, CHUNK), spec))
        report(min(start + CHUNK, len(positions)), len(positions))
    return np.concatenate(rows), dict(sorted(bad.items()))


def open_model(spec: EncodedSpec, worker: WorkerContext) -> Backbone:
    """The CLIP that encodes the images."""
    return worker.backbone(spec.features.backbone, spec.features.precision)


def build(
    spec: EncodedSpec,
    index: int,
    block: int,
    worker: WorkerContext,
    backbone: Callable[[], Backbone],
) -> dict[str, Any]:
    """Encode one block, unless the store has it or the features of the dataset.

    Returns:
        Number of encoded images, 0 if the store had them, and the seconds.

    Raises:
        ChangedInput: the files of the dataset, or of these images, do not match its digest.
        RuntimeError: the block has killed the last processes that encoded it.
    """
    counts: dict[str, Any] = {"encoded": 0, "on_device": 0.0}
    if worker.store.has(spec.features):
        return counts
    row = worker.store.open_row(spec)
    with exclusive_shard(row, index, block, worker.store) as exists:
        if exists:
            return counts
        backbone()
        started = time.monotonic()
        dataset = spec.features.dataset
        examples = worker.examples(dataset)
        first = block * spec.block
        positions = range(len(examples.images))[first : first + spec.block]
        features, bad = np.empty(0), dict[int, str]()
        if positions:  # a dataset of a plugin can have more image files than images
            features, bad = encode(spec.features, examples, positions, worker)
        worker.check_images(dataset, positions)
        reasons = np.frombuffer(json.dumps(bad).encode(), dtype=np.uint8)
        data = sealed(save({"features": features, "bad": reasons}, {"seal": BLANK}))
        row.publish(index, block, data)
    return {"encoded": len(positions), "on_device": time.monotonic() - started}


def read_blocks(
    spec: EncodedSpec, images: int, worker: WorkerContext, report: Callable[[int, int], None]
) -> Encoded:
    """Read the blocks of a dataset; encodes those that are missing.

    Args:
        images: number of images of the dataset.
        report: as for `encode`.

    Raises:
        DamagedArtifact: a shard is damaged.
    """
    row, rows = worker.store.row(spec), []
    bad: dict[int, str] = {}
    for _, block in spec.shards(images, (0,)):
        build(spec, 0, block, worker, lambda: open_model(spec, worker))
        arrays = load(row.read(0, block))
        rows.append(arrays["features"])
        reasons = json.loads(arrays["bad"].tobytes())
        bad |= {int(position): reason for position, reason in reasons.items()}
        report(min((block + 1) * spec.block, images), images)
    return np.concatenate(rows), bad
