"""Rows of synthetic images: each class has an unlimited, numbered row that is drawn block by block,
and a trial reads the first images of each class.

`build` alone makes images; on the cluster it is mapped over actors.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.numpy import load, save
from torch import Tensor

from air_core.classifiers import text_classifier
from air_core.datasets.class_folders import class_files
from air_core.datasets.images import open_png
from air_core.diffusion import ImageGenerator, draw, image_seed, load_generator, text_of
from air_core.diffusion.folder import FolderGenerator
from air_core.seal import BLANK, sealed
from air_core.specs import (
    EvidenceSpec,
    FolderImages,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    SyntheticFeaturesSpec,
)
from air_core.types import Batch, Labelled
from orchestrator.errors import DamagedArtifact, MissingArtifact
from orchestrator.planning.resolve import images_folder
from orchestrator.stages.context import WorkerContext
from orchestrator.store import ArtifactStore
from orchestrator.store.rows import DEATHS, Row


def open_generator(
    images: GeneratedImages | FolderImages, worker: WorkerContext, thrift: int = 0
) -> ImageGenerator:
    """The generator of a row, with its LoRA from the store.

    Raises:
        ChangedInput: ready images do not match the row's digest.
    """
    adapter = None
    if isinstance(images, GeneratedImages) and images.lora is not None:
        adapter = worker.store.get(images.lora).path
    folder = images_folder(images.model.name)
    generator = load_generator(images, folder, adapter, worker.device, thrift)
    # After the generator has listed the images: it notices later changes itself.
    if isinstance(images, FolderImages):
        worker.check_ready_images(images.model)
    return generator


def open_model(spec: SyntheticFeaturesSpec, worker: WorkerContext, thrift: int) -> ImageGenerator:
    """The generator of the images of a row, with the CLIP loaded that encodes them."""
    generator = open_generator(spec.images, worker, thrift)
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
    row = worker.store.open_row(spec.images)
    with exclusive_shard(row, class_index, block, worker.store):
        drawn: dict[str, Any] = {"drawn": 0, "redrawn": 0, "holes": 0, "on_device": 0.0}
        features = worker.store.open_row(spec)
        encoded_before = features.has_shard(class_index, block)
        shard = (class_index, block)
        # The images are read only where their features are missing.
        has_images = (
            row.has_shard(*shard) if encoded_before else has_intact_shard(row, *shard, worker.store)
        )
        if not has_images:
            data = shard_before(spec.images, *shard, worker.store)
            if data is None:
                table, drawn = _draw(spec.images, class_index, block, generator())
                data = sealed(_parquet(table))
            row.publish(class_index, block, data)
        if not encoded_before:
            data = row.read(class_index, block)
            table = pq.read_table(io.BytesIO(data), columns=["image", "ok"])
            images = [open_png(png) for png in table["image"].to_pylist()]
            started = time.monotonic()
            encoded_images = worker.encode(images, spec)
            drawn["on_device"] += time.monotonic() - started
            arrays = {"features": encoded_images, "ok": np.array(table["ok"].to_pylist())}
            encoded = sealed(save(arrays, {"seal": BLANK}))
            features.publish(class_index, block, encoded)
        return drawn


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


def lora_before(labels: LabelsSpec) -> LoraSpec:
    """The LoRA of the round before, whose images choose these labels."""
    assert labels.images is not None
    assert isinstance(labels.images.images, GeneratedImages)
    assert labels.images.images.lora is not None
    return labels.images.images.lora


def shard_before(
    spec: GeneratedImages | FolderImages | EvidenceSpec,
    index: int,
    block: int,
    store: ArtifactStore,
) -> bytes | None:
    """A shard of the LoRA round before if the LoRA is a copy of that round's, so it is equal."""
    if isinstance(spec, FolderImages) or spec.lora is None:
        return None
    if not store.record(spec.lora)["info"].get("copied"):
        return None
    row = store.row(replace(spec, lora=lora_before(spec.lora.labels)))
    if not has_intact_shard(row, index, block, store):
        return None
    return row.read(index, block)


def _draw(
    images: GeneratedImages | FolderImages,
    class_index: int,
    block: int,
    generator: ImageGenerator,
) -> tuple[pa.Table, dict[str, Any]]:
    size = images.block_size
    classname = images.classnames[class_index]
    indices = list(range(block * size, (block + 1) * size))
    started = time.monotonic()
    pixels, attempts, ok = draw(generator, classname, indices)
    on_device = time.monotonic() - started
    seeds = [
        image_seed(images.settings.seed, classname, index, attempt)
        if isinstance(images, GeneratedImages)
        else 0
        for index, attempt in zip(indices, attempts, strict=True)
    ]
    table = pa.table(
        {
            "index": pa.array(indices, pa.int32()),
            "class": [classname] * size,
            "prompt": [_prompt(images, classname, index) for index in indices],
            "seed": pa.array(seeds, pa.uint64()),
            "attempt": pa.array(attempts, pa.int8()),
            "ok": ok,
            "image": [_png(image) for image in pixels.numpy()],
        }
    )
    files = generator.files[classname] if isinstance(generator, FolderGenerator) else None
    redrawn = sum(attempt > 0 for attempt in attempts)
    return table, {**block_counts(ok, block, files), "redrawn": redrawn, "on_device": on_device}


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


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
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
                    f"{store.name}; run `airsweep prepare SPEC` first"
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


def recognised_share(
    spec: SyntheticFeaturesSpec, count: int, worker: WorkerContext, template: str
) -> float:
    """Share of the first images that zero-shot CLIP assigns to the class they were drawn for."""
    bank = read_synthetic(spec, count, worker.store, drawn_classes(spec, worker.store))
    backbone = worker.backbone(spec.backbone, spec.precision)
    text = text_classifier(backbone, spec.images.classnames, template)
    return float((text.logits(bank.batch).argmax(dim=-1) == bank.labels).double().mean())


@dataclass(frozen=True)
class DrawnImage:
    """One image of a row, with its features and the attempt that drew it."""

    class_index: int
    index: int
    attempt: int  # the attempt that was kept, from 0
    ok: bool  # False: a hole, which no trial reads
    png: bytes
    features: np.ndarray  # (D,)


def read_drawn_images(
    spec: SyntheticFeaturesSpec, classes: Sequence[int], count: int, store: ArtifactStore
) -> Iterator[DrawnImage]:
    """Read the first `count` images of each class with the holes, one after the other.

    Raises:
        DamagedArtifact: a shard is damaged.
    """
    pictures, features = store.row(spec.images), store.row(spec)
    shards = [(c, block) for c in classes for block in range(spec.blocks(count))]
    pictures.pull(shards)
    features.pull(shards)
    size = spec.images.block_size
    for c, block in shards:
        data = pictures.read(c, block)
        table = pq.read_table(io.BytesIO(data), columns=["index", "attempt", "ok", "image"])
        arrays = load(features.read(c, block))
        for i, row in enumerate(table.to_pylist()[: count - block * size]):
            yield DrawnImage(
                c, row["index"], row["attempt"], row["ok"], row["image"], arrays["features"][i]
            )


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
