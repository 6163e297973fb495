"""Stores that have the CLIP features of some digits, and the same with other labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from air_core.datasets import get_dataset
from air_core.specs import FeaturesSpec
from orchestrator.stages.build import PARTS
from orchestrator.store import ArtifactStore

Arrays = dict[str, np.ndarray]


def digit_features(clip: Any, parts: tuple[str, ...], images: int) -> Arrays:
    """Features of the first digits, with fixed parts, so that splits do not depend on labels."""
    examples = get_dataset("digits").load(None)
    numbers = np.tile([PARTS.index(part) for part in parts], images // len(parts))
    return {
        "features": clip.encode_images(examples.images[:images]).numpy(),
        "labels": examples.labels[:images],
        "parts": numbers.astype(np.int8),
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
        return {}

    store.get_or_build(spec, build)
    return store
