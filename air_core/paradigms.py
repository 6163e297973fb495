"""A paradigm is a split: which images are seen without label, which with, which are for test."""

from __future__ import annotations

import math

import numpy as np
import torch

from air_core.specs import SplitSettings
from air_core.types import Split

TEST_SHARE = 0.3  # of all images, where the dataset has no test part of its own


def make_split(labels: np.ndarray, parts: np.ndarray, settings: SplitSettings) -> Split:
    """Positions of pool, validation and test images.

    Args:
        labels: (N,) classes, read only to stratify where the dataset has no split of its own.
        parts: (N,) train, val, test or free (air_core.datasets.Examples).

    The pool never holds a test image. With `pool: train` it holds no validation image either.

    Raises:
        ValueError: a part would be empty.
    """
    return {"ul": _unsupervised}[settings.paradigm](labels, parts, settings)


def _unsupervised(labels: np.ndarray, parts: np.ndarray, settings: SplitSettings) -> Split:
    parts = _fixed(labels, parts, settings.split_seed)
    pool = np.isin(parts, settings.pool.split("+"))
    validation = (parts == "val") & ~pool
    split = Split(
        pool=torch.from_numpy(np.flatnonzero(pool)),
        validation=torch.from_numpy(np.flatnonzero(validation)),
        test=torch.from_numpy(np.flatnonzero(parts == "test")),
    )
    if not len(split.pool) or not len(split.test):
        raise ValueError(
            f"the split has {len(split.pool)} pool and {len(split.test)} test images; "
            "both need at least one"
        )
    return split


def _fixed(labels: np.ndarray, parts: np.ndarray, split_seed: int) -> np.ndarray:
    """Free images become train or test, stratified by class, moved by the seed."""
    from sklearn.model_selection import train_test_split

    parts = parts.astype("<U5")
    free = np.flatnonzero(parts == "free")
    if len(free):
        train, test = train_test_split(
            free,
            test_size=math.ceil(TEST_SHARE * len(parts)),
            stratify=labels[free],
            random_state=split_seed,
        )
        parts[train] = "train"
        parts[test] = "test"
    return parts
