"""One function a stage: from its spec and the store to an artifact. Knows no sweep, no cluster.

A stage reads what its spec nests, from the store; nothing else. `build_image_block` is the only
maker of images: on the cluster it is mapped over actors, in a test it is called.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor

from air_core.backbone import Backbone, load_backbone
from air_core.classifiers import auxiliary_classifier, fuse, text_classifier
from air_core.datasets import Examples, get_dataset
from air_core.diffusion import ImageGenerator, image_seed, load_generator, rejected
from air_core.diffusion.lora import train_lora
from air_core.paradigms import make_split
from air_core.pseudo_labels.top_k import balanced_choice
from air_core.specs import (
    AuxiliarySettings,
    FeaturesSpec,
    FolderImages,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    Ref,
    SplitSettings,
    SyntheticFeaturesSpec,
)
from air_core.types import Batch, Labelled, Split
from orchestrator.resolve import folder_of
from orchestrator.store import Artifact, ArtifactStore, MissingArtifact

PARTS = ("train", "val", "test", "free")
ATTEMPTS = 3  # draws of one slot before it is a recorded hole
# How a later LoRA round's labels are chosen; the same in every world.
RELABEL = AuxiliarySettings(kind="lda")
RELABEL_WEIGHT = 0.5


@dataclass(frozen=True)
class Workshop:
    """Where a stage works: its store, its data, its device."""

    store: ArtifactStore
    data_root: Path | None = None
    device: str = "cpu"

    def examples(self, dataset: Ref) -> Examples:
        return _examples(dataset.name, self.data_root)

    def backbone(self, backbone: Ref) -> Backbone:
        return _backbone(folder_of("backbone", backbone.name), self.device)


@cache
def _examples(name: str, data_root: Path | None) -> Examples:
    return get_dataset(name).load(data_root)


@cache
def _backbone(folder: Path, device: str) -> Backbone:
    return load_backbone(folder, device)


# ---------------------------------------------------------------- features


def build_features(spec: FeaturesSpec, shop: Workshop) -> Artifact:
    """CLIP features of a whole dataset."""

    def build(folder: Path) -> dict[str, Any]:
        examples = shop.examples(spec.dataset)
        features = shop.backbone(spec.backbone).encode_images(examples.images)
        arrays = {
            "features": features.numpy(),
            "labels": examples.labels,
            "parts": np.array([PARTS.index(part) for part in examples.parts], dtype=np.int8),
        }
        save_file(arrays, folder / "features.safetensors")
        return {"images": len(features)}

    return shop.store.get_or_build(spec, build)


@dataclass(frozen=True)
class Target:
    """A dataset as a frozen CLIP sees it, with its split."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N,)
    split: Split

    def batch(self, index: Tensor) -> Batch:
        return Batch(self.features[index])

    def labelled(self, index: Tensor) -> Labelled:
        return Labelled(self.batch(index), self.labels[index])


def read_target(spec: FeaturesSpec, split: SplitSettings, store: ArtifactStore) -> Target:
    """Features and split of a dataset.

    Raises:
        MissingArtifact: the features were not made yet.
    """
    return _target(store.get(spec).path / "features.safetensors", split)


@cache
def _target(path: Path, split: SplitSettings) -> Target:
    arrays = load_file(path)
    parts = np.array(PARTS)[arrays["parts"]]
    return Target(
        features=torch.from_numpy(arrays["features"]),
        labels=torch.from_numpy(arrays["labels"]),
        split=make_split(arrays["labels"], parts, split),
    )


# ---------------------------------------------------------------- labels and LoRA


def build_labels(spec: LabelsSpec, shop: Workshop) -> Artifact:
    """The pool images that a LoRA is trained on, with their pseudo-labels."""

    def build(folder: Path) -> dict[str, Any]:
        target = read_target(spec.features, spec.split, shop.store)
        dataset = get_dataset(spec.features.dataset.name)
        pool = target.batch(target.split.pool)
        text = text_classifier(
            shop.backbone(spec.features.backbone), dataset.classnames, dataset.template
        )
        auxiliary = None
        classes = len(dataset.classnames)
        if spec.images is not None:
            bank = read_synthetic(spec.images, spec.settings.images_per_class, shop.store)
            auxiliary = auxiliary_classifier(RELABEL, bank, None, pool, classes, text.sharpness)
        believed = fuse(text, auxiliary, pool, RELABEL_WEIGHT, RELABEL.temperature)
        taken = balanced_choice(believed.scores(pool), torch.full((classes,), spec.settings.k))
        chosen = (taken >= 0).nonzero().flatten()
        index, labels = target.split.pool[chosen], taken[chosen]
        save_file({"index": index.numpy(), "labels": labels.numpy()}, folder / "labels.safetensors")
        # The true labels are looked at here for the record only.
        right = (target.labels[index] == labels).double().mean().item()
        return {"images": len(index), "accuracy": right}

    return shop.store.get_or_build(spec, build)


def build_lora(
    spec: LoraSpec, shop: Workshop, report: Callable[[int, int, float], None] | None = None
) -> Artifact:
    """LoRA adapters of a diffusion model, trained on pseudo-labelled pool images."""

    def build(folder: Path) -> dict[str, Any]:
        chosen = load_file(shop.store.get(spec.labels).path / "labels.safetensors")
        dataset = get_dataset(spec.labels.features.dataset.name)
        examples = shop.examples(spec.labels.features.dataset)
        pixels = np.stack([_square(examples.images[i], spec.size) for i in chosen["index"]])
        names = [dataset.classnames[c].replace("_", " ") for c in chosen["labels"]]
        return train_lora(
            torch.from_numpy(pixels),
            [spec.training.caption.format(name) for name in names],
            folder_of("generator", spec.model.name),
            spec.training,
            spec.size,
            folder,
            device=shop.device,
            report=report,
        )

    return shop.store.get_or_build(spec, build)


def _square(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the shorter side resized, the centre kept."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


# ---------------------------------------------------------------- images


def open_generator(images: GeneratedImages | FolderImages, shop: Workshop) -> ImageGenerator:
    """The generator of a row, with its LoRA from the store."""
    adapter = None
    if isinstance(images, GeneratedImages) and images.lora is not None:
        adapter = shop.store.get(images.lora).path
    return load_generator(images, folder_of("generator", images.model.name), adapter, shop.device)


def build_image_block(
    spec: SyntheticFeaturesSpec,
    class_index: int,
    block: int,
    shop: Workshop,
    generator: Callable[[], ImageGenerator],
) -> dict[str, int]:
    """Draw one block of one class and encode it, unless it is there already.

    A block is one batch, always the same one. A rejected slot (blank, not a number) is drawn
    again within the same batch, with its next attempt, and only that slot is kept; after
    ATTEMPTS it is a recorded hole.

    Returns:
        images drawn (kept), redrawn slots, holes; all 0 if the images were there.
    """
    row = shop.store.open_row(spec.images)
    shard = row.shard(class_index, block, ".parquet")
    drawn = {"drawn": 0, "redrawn": 0, "holes": 0}
    if not shard.exists():
        table, drawn = _draw(spec.images, class_index, block, generator())
        _write_shard(table, shard)
    features = shop.store.open_row(spec).shard(class_index, block, ".safetensors")
    if not features.exists():
        table = pq.read_table(shard, columns=["image", "ok"])
        images = [Image.open(io.BytesIO(png)) for png in table["image"].to_pylist()]
        encoded = shop.backbone(spec.backbone).encode_images(images)
        arrays = {"features": encoded.numpy(), "ok": np.array(table["ok"].to_pylist())}
        temporary = features.with_name(f".{features.name}-{os.getpid()}")
        save_file(arrays, temporary)
        os.replace(temporary, features)
    return drawn


def _draw(
    images: GeneratedImages | FolderImages,
    class_index: int,
    block: int,
    generator: ImageGenerator,
) -> tuple[pa.Table, dict[str, int]]:
    size = images.block_size
    classname = images.classnames[class_index]
    indices = list(range(block * size, (block + 1) * size))
    attempts = [0] * size
    pixels = generator.generate(classname, indices, attempts)  # (size, H, W, 3) uint8
    bad = rejected(pixels)
    redrawn = int(bad.sum())
    for attempt in range(1, ATTEMPTS):
        if not bad.any():
            break
        tried = [attempt if hopeless else 0 for hopeless in bad.tolist()]
        again = generator.generate(classname, indices, tried)
        for slot in bad.nonzero().flatten().tolist():
            pixels[slot] = again[slot]
            attempts[slot] = attempt
        bad = rejected(pixels)
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
            "prompt": [_prompt(images, classname)] * size,
            "seed": pa.array(seeds, pa.uint64()),
            "attempt": pa.array(attempts, pa.int8()),
            "ok": [not hopeless for hopeless in bad.tolist()],
            "image": [_png(one) for one in pixels.numpy()],
        }
    )
    holes = int(bad.sum())
    return table, {"drawn": size - holes, "redrawn": redrawn, "holes": holes}


def _prompt(images: GeneratedImages | FolderImages, classname: str) -> str:
    if isinstance(images, FolderImages):
        return ""
    return images.settings.template.format(classname.replace("_", " "))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write_shard(table: pa.Table, place: Path) -> None:
    temporary = place.with_name(f".{place.name}-{os.getpid()}")
    pq.write_table(table, temporary)
    os.replace(temporary, place)


def read_synthetic(spec: SyntheticFeaturesSpec, count: int, store: ArtifactStore) -> Labelled:
    """The first `count` images of each class, by class; holes are left out.

    Raises:
        MissingArtifact: they were not drawn yet.
    """
    row = store.row(spec)
    size = spec.images.block_size
    features, labels = [], []
    for c, classname in enumerate(spec.images.classnames):
        for block in range(spec.blocks(count)):
            shard = row.shard(c, block, ".safetensors")
            if not shard.exists():
                raise MissingArtifact(
                    f"image {block * size} of {classname!r} is not in {row.key} under "
                    f"{store.root}; run `airsweep prepare SPEC` first"
                )
            arrays = load_file(shard)
            wanted = arrays["ok"][: count - block * size]
            kept = torch.from_numpy(arrays["features"][: len(wanted)][wanted])
            features.append(kept)
            labels.append(torch.full((len(kept),), c))
    return Labelled(Batch(torch.cat(features)), torch.cat(labels))


def read_images(
    spec: SyntheticFeaturesSpec, classes: Sequence[int], count: int, store: ArtifactStore
) -> list[list[Image.Image]]:
    """The first pictures of each class, for people; classes that were not drawn are empty."""
    row = store.row(spec.images)
    found = []
    for c in classes:
        pictures: list[Image.Image] = []
        for block in range(spec.blocks(count)):
            shard = row.shard(c, block, ".parquet")
            if shard.exists():
                stored = pq.read_table(shard, columns=["image"])["image"].to_pylist()
                pictures += [Image.open(io.BytesIO(png)).convert("RGB") for png in stored]
        found.append(pictures[:count])
    return found


def recognised(spec: SyntheticFeaturesSpec, count: int, shop: Workshop, template: str) -> float:
    """Share of the first images that zero-shot CLIP takes for the class they were drawn for."""
    bank = read_synthetic(spec, count, shop.store)
    text = text_classifier(shop.backbone(spec.backbone), spec.images.classnames, template)
    return float((text.logits(bank.batch).argmax(dim=-1) == bank.labels).double().mean())
