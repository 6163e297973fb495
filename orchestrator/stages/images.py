"""Rows of synthetic images: each class has an unlimited, numbered row that is drawn block by block,
and a trial reads the first images of each class.

`build` alone makes images; on the cluster it is mapped over actors.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.numpy import load, save
from torch import Tensor

from air_core.captions import text_of
from air_core.classifiers import text_classifier
from air_core.components import GENERATORS
from air_core.datasets.class_folders import class_files
from air_core.datasets.images import open_png
from air_core.diffusion import ImageGenerator, draw, image_seed
from air_core.diffusion.folder import FolderGenerator
from air_core.diffusion.loading import load_generator
from air_core.seal import BLANK, sealed
from air_core.specs import (
    FolderImages,
    GeneratedImages,
    SyntheticFeaturesSpec,
)
from air_core.types import Batch, Labelled
from orchestrator.errors import DamagedArtifact, MissingArtifact
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.inputs import images_folder
from orchestrator.store import ArtifactStore
from orchestrator.store.rows import DEATHS, Row

PNG_LEVEL = 3  # of compression: 2.4 times as fast as the default 6, files are 7 % larger


def open_generator(images: GeneratedImages | FolderImages, worker: WorkerContext) -> ImageGenerator:
    """The generator of a row, with its LoRA from the store.

    Raises:
        ChangedInput: ready images do not match the row's digest.
    """
    adapter = None
    if isinstance(images, GeneratedImages) and images.lora is not None:
        adapter = worker.store.get(images.lora).path
    if isinstance(images, GeneratedImages) and images.model.name in GENERATORS:
        plugin: ImageGenerator = GENERATORS.load(images.model.name)(images.settings, worker.device)
        return plugin
    folder = images_folder(images.model.name)
    generator = load_generator(images, folder, adapter, worker.device, worker.thrift)
    # After the generator has listed the images: it notices later changes itself.
    if isinstance(images, FolderImages):
        worker.check_ready_images(images.model)
    return generator


def open_model(spec: SyntheticFeaturesSpec, worker: WorkerContext) -> ImageGenerator:
    """The generator of the images of a row, with the CLIP loaded that encodes them."""
    generator = open_generator(spec.images, worker)
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
        Numbers of drawn images, redrawn images and holes, all 0 if the store had the images; the
        seconds of drawing and encoding on the device; and, as JSON, the files of ready images
        that became holes.

    Raises:
        RuntimeError: the block has killed the last processes that drew it.
    """
    row, features = worker.store.open_row(spec.images), worker.store.open_row(spec)
    shard = (class_index, block)
    with exclusive_shard(row, *shard, worker.store):
        counts: dict[str, Any] = {"drawn": 0, "redrawn": 0, "holes": 0, "on_device": 0.0}
        encoded_before = features.has_shard(*shard)
        # The images are read only where their features are missing.
        has_images = (
            row.has_shard(*shard) if encoded_before else has_intact_shard(row, *shard, worker.store)
        )
        drawn = None
        with ThreadPoolExecutor(1) as writer:  # while CLIP encodes the images, they are written
            writing: list[Future[None]] = []
            if not has_images:
                drawn, counts = _draw(spec.images, *shard, generator())
                writing.append(writer.submit(_publish, row, spec.images, *shard, drawn))
            if not encoded_before:
                images, ok = (
                    _stored(row.read(*shard)) if drawn is None else (drawn.images, drawn.ok)
                )
                started = time.monotonic()
                arrays = {"features": worker.encode(images, spec), "ok": np.array(ok)}
                counts["on_device"] += time.monotonic() - started
        for written in writing:
            written.result()
        if not encoded_before:
            features.publish(*shard, sealed(save(arrays, {"seal": BLANK})))
        return counts


@contextmanager
def exclusive_shard(row: Row, index: int, block: int, store: ArtifactStore) -> Iterator[None]:
    """Lock a shard of a row while it is made, by its class or draw and its block.

    Raises:
        RuntimeError: the shard has killed the last processes that made it.
    """
    with (
        store.locks.exclusive(f"{row.key.digest}-{index}-{block}"),
        # Counted on disk: after each death the cluster would start another process, without end.
        row.count_crashes(index, block) as deaths,
    ):
        if deaths >= DEATHS:
            raise RuntimeError(f"killed its process {deaths} times")
        yield


def has_intact_shard(row: Row, index: int, block: int, store: ArtifactStore) -> bool:
    """Whether a shard exists and can be read; a damaged one is set aside."""
    if not row.has_shard(index, block):
        return False
    try:
        row.read(index, block)
    except DamagedArtifact as damaged:
        store.set_aside(damaged)
        return False
    return True


@dataclass(frozen=True)
class _Drawn:
    """A block of images."""

    images: list[Image.Image]
    attempts: list[int]
    ok: list[bool]


def _draw(
    images: GeneratedImages | FolderImages,
    class_index: int,
    block: int,
    generator: ImageGenerator,
) -> tuple[_Drawn, dict[str, Any]]:
    """The block, and its counts as `build` returns them."""
    classname = images.classnames[class_index]
    started = time.monotonic()
    pixels, attempts, ok = draw(generator, classname, _indices(images, block))
    on_device = time.monotonic() - started
    drawn = _Drawn([Image.fromarray(image) for image in pixels.numpy()], attempts, ok)
    files = generator.files[classname] if isinstance(generator, FolderGenerator) else None
    redrawn = sum(attempt > 0 for attempt in attempts)
    counts = block_counts(ok, block, files)
    return drawn, {**counts, "redrawn": redrawn, "on_device": on_device}


def _indices(images: GeneratedImages | FolderImages, block: int) -> list[int]:
    return list(range(block * images.block_size, (block + 1) * images.block_size))


def _publish(
    row: Row, images: GeneratedImages | FolderImages, class_index: int, block: int, drawn: _Drawn
) -> None:
    """Write a block of images with their prompts and seeds."""
    classname, indices = images.classnames[class_index], _indices(images, block)
    seeds = [
        image_seed(images.settings.seed, classname, index, attempt)
        if isinstance(images, GeneratedImages)
        else 0
        for index, attempt in zip(indices, drawn.attempts, strict=True)
    ]
    with ThreadPoolExecutor() as threads:
        pngs = list(threads.map(_png, drawn.images))
    table = pa.table(
        {
            "index": pa.array(indices, pa.int32()),
            "class": [classname] * len(indices),
            "prompt": [_prompt(images, classname, index) for index in indices],
            "seed": pa.array(seeds, pa.uint64()),
            "attempt": pa.array(drawn.attempts, pa.int8()),
            "ok": drawn.ok,
            "image": pngs,
        }
    )
    row.publish(class_index, block, sealed(_parquet(table)))


def _stored(shard: bytes) -> tuple[list[Image.Image], list[bool]]:
    """The images of a shard, and whether each is no hole."""
    table = pq.read_table(io.BytesIO(shard), columns=["image", "ok"])
    return [open_png(png) for png in table["image"].to_pylist()], table["ok"].to_pylist()


def block_counts(ok: Sequence[bool], block: int, files: Sequence[Path] | None) -> dict[str, Any]:
    """Numbers of images and holes of a block.

    Args:
        ok: whether an image is not a hole.
        files: ready images of the class; the last block can extend beyond them.

    Returns:
        `drawn`, `holes`, and of ready images `hole_files`, `<class folder>/<file>`, as JSON.
    """
    if files is None:
        return {"drawn": sum(ok), "holes": len(ok) - sum(ok)}
    holes = [file for file, whole in zip(files[block * len(ok) :], ok, strict=False) if not whole]
    names = [f"{file.parent.name}/{file.name}" for file in holes]
    return {"drawn": sum(ok), "holes": len(holes), "hole_files": json.dumps(names)}


def stored_counts(
    spec: SyntheticFeaturesSpec, class_index: int, block: int, store: ArtifactStore
) -> dict[str, Any]:
    """The counts of a block that the store has, as `block_counts`."""
    files = None
    if isinstance(spec.images, FolderImages):
        name = spec.images.classnames[class_index]
        files = class_files(images_folder(spec.images.model.name), [name])[name]
    return block_counts(load(store.row(spec).read(class_index, block))["ok"].tolist(), block, files)


def _prompt(images: GeneratedImages | FolderImages, classname: str, index: int) -> str:
    if isinstance(images, FolderImages):
        return ""
    return text_of(images.settings.template, classname, index)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"seal": BLANK})
    return bytes(buffer.getvalue())


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
    features, labels = _read_row(spec, count, store, classes)
    patches = None if tokens is None else _read_row(tokens, count, store, classes)[0]
    return Labelled(Batch(features, patches), labels)


def _read_row(
    spec: SyntheticFeaturesSpec,
    count: int,
    store: ArtifactStore,
    classes: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    row = store.row(spec)
    size = spec.images.block_size
    features, labels = [], []
    class_indices = range(len(spec.images.classnames)) if classes is None else classes
    blocks = range(spec.blocks(count))
    row.pull([(c, block) for c in class_indices for block in blocks])
    for c in class_indices:
        classname = spec.images.classnames[c]
        for block in blocks:
            try:
                arrays = load(row.read(c, block))
            except FileNotFoundError:
                raise MissingArtifact(
                    f"image {block * size} of {classname!r} is not in {row.key} under "
                    f"{store.name}; run `airsweep run SPEC --prepare` first"
                ) from None
            ok = arrays["ok"][: count - block * size]
            images = torch.from_numpy(arrays["features"][: len(ok)][ok])
            features.append(images)
            labels.append(torch.full((len(images),), c))
    return torch.cat(features), torch.cat(labels)


def drawn_classes(spec: SyntheticFeaturesSpec, store: ArtifactStore) -> list[int]:
    """Ascending indices of the classes with images: TRZSL draws only unseen classes."""
    return sorted({c for c, _ in store.row(spec.images).existing_shards()})


def drawn_per_class(spec: SyntheticFeaturesSpec, limit: int, store: ArtifactStore) -> int:
    """The number of images that each drawn class has from the first on, at most `limit`."""
    present = store.row(spec.images).existing_shards()
    blocks = range(spec.blocks(limit))
    first_gaps = (
        next((block for block in blocks if (c, block) not in present), len(blocks))
        for c in {c for c, _ in present}
    )
    return min(limit, min(first_gaps) * spec.images.block_size)


def drawn_blocks(
    spec: SyntheticFeaturesSpec, store: ArtifactStore
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Read class, indices (B,) and features (B, D) of each block in the store, without holes."""
    row = store.row(spec)
    shards = sorted(row.existing_shards())
    row.pull(shards)
    for c, block in shards:
        arrays = load(row.read(c, block))
        ok = np.flatnonzero(arrays["ok"])
        indices = block * spec.images.block_size + ok
        yield c, indices.tolist(), torch.from_numpy(arrays["features"][ok])


def recognised_share(spec: SyntheticFeaturesSpec, worker: WorkerContext, template: str) -> float:
    """Share of all drawn images that zero-shot CLIP assigns to the class they were drawn for."""
    backbone = worker.backbone(spec.backbone, spec.precision)
    text = text_classifier(backbone, spec.images.classnames, template)
    right = total = 0
    for c, indices, features in drawn_blocks(spec, worker.store):
        right += int((text.logits(Batch(features)).argmax(dim=-1) == c).sum())
        total += len(indices)
    return right / max(total, 1)


def read_pictures(
    spec: SyntheticFeaturesSpec, positions: Iterable[tuple[int, int]], store: ArtifactStore
) -> dict[tuple[int, int], Image.Image]:
    """Read pictures by class and index."""
    row, size = store.row(spec.images), spec.images.block_size
    by_shard: dict[tuple[int, int], list[int]] = {}
    for c, index in sorted(set(positions)):
        by_shard.setdefault((c, index // size), []).append(index)
    row.pull(by_shard)
    pictures = {}
    for (c, block), indices in by_shard.items():
        data = row.read(c, block)
        stored = pq.read_table(io.BytesIO(data), columns=["image"])["image"]
        for index in indices:
            png = stored[index % size].as_py()
            pictures[c, index] = open_png(png)
    return pictures
