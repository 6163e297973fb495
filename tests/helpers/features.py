"""Stores that have the CLIP features of some digits, and the same with other labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from air_core.datasets import get_dataset
from orchestrator.stages import FeaturesSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.dataset_text import read_dataset_text
from orchestrator.stages.features import PARTS
from orchestrator.store import ArtifactStore

Arrays = dict[str, np.ndarray]
IMAGES = 240  # of the digits: enough for every class, and quick


def digit_features(
    encode: Callable[[Any], np.ndarray],
    images: int,
    parts: tuple[str, ...] = (),
    dataset: str = "digits",
) -> Arrays:
    """Features of the first digits, or of the first images of another dataset.

    Args:
        encode: returns the features of images.
        parts: repeated, so that splits do not depend on labels; empty: the parts of the dataset.
    """
    examples = get_dataset(dataset).load(None)
    names = parts * (images // len(parts)) if parts else examples.parts[:images]
    return {
        "features": np.asarray(encode(examples.images[:images])),
        "labels": examples.labels[:images],
        "parts": np.array([PARTS.index(name) for name in names], dtype=np.int8),
    }


def relabelled(arrays: Arrays, part: str) -> Arrays:
    """The arrays with the labels of one part permuted."""
    index = np.flatnonzero(arrays["parts"] == PARTS.index(part))
    labels = arrays["labels"].copy()
    labels[index] = labels[np.random.default_rng(0).permutation(index)]
    return {**arrays, "labels": labels}


def store_with(root: Path, spec: FeaturesSpec, arrays: Arrays) -> ArtifactStore:
    store = ArtifactStore(root)

    def build(folder: Path) -> dict[str, Any]:
        save_file(arrays, folder / "features.safetensors")
        return asdict(read_dataset_text(spec, store))

    store.get_or_build(spec, build)
    return store


def encode(spec: FeaturesSpec, store: ArtifactStore) -> None:
    """Put the features of the first images of a dataset into a store."""

    def encoded(images: Any) -> np.ndarray:
        return WorkerContext(store).encode(images, spec)

    store_with(store.root, spec, digit_features(encoded, IMAGES, dataset=spec.dataset.name))
