"""Learning paradigms: which images are unlabelled, labelled, for validation and for test.

Importing this module is cheap: only `make_split` loads torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from air_core.datasets.stratified import stratified
from air_core.settings import UNKNOWN, SplitSettings

if TYPE_CHECKING:
    from air_core.types import Split

TEST_SHARE = 0.3  # of all images, if the dataset has no test part
SEEN_SHARE = 0.62  # of the classes, in TRZSL

Chosen = tuple[np.ndarray, tuple[int, ...] | None]  # labelled positions, and unseen classes


def make_split(labels: np.ndarray, parts: np.ndarray, settings: SplitSettings) -> Split:
    """Split the images of a dataset into pool, labelled, validation and test images.

    UL: the pool is all of train (and val). SSL: `shots` images of each class move from the pool to
    the labelled images. TRZSL: all images of seen classes move there, `pool_size` at most.

    The pool never contains test images, except with `leaky_pool`. With `pool: train` it contains no
    validation images. If the dataset has images without a label, these are the pool, and there may
    be no test image.

    Args:
        labels: (N,) classes, UNKNOWN where there is no label. Used for the labelled images of the
            paradigm, and to stratify if the dataset defines no split.
        parts: (N,) train, val, test, free or bad (air_core.datasets.Examples).

    Raises:
        ValueError: a part is empty, a class has too few images, there are too few classes, or the
            settings need labels that do not exist.
    """
    import torch

    from air_core.types import Split

    positions, unseen = split_positions(labels, parts, settings)
    return Split(
        **{name: torch.from_numpy(of) for name, of in positions.items()},
        unseen=None if unseen is None else torch.tensor(unseen),
    )


def split_positions(
    labels: np.ndarray, parts: np.ndarray, settings: SplitSettings
) -> tuple[dict[str, np.ndarray], tuple[int, ...] | None]:
    """Like `make_split`, without torch: positions by part, and the unseen classes."""
    parts = _fixed(labels, parts, settings.split_seed)
    unlabelled = bool((labels == UNKNOWN).any())
    if unlabelled and (problem := label_problem(settings)):
        raise ValueError(problem)
    wanted = ["train"] if unlabelled else settings.pool.split("+")
    wanted += ["test"] if settings.leaky_pool else []
    train = np.isin(parts, wanted)
    validation = np.flatnonzero((parts == "val") & ~train)
    test = np.flatnonzero(parts == "test")
    labelled, unseen = PARADIGMS[settings.paradigm](labels, np.flatnonzero(train), settings)
    pool = _shaped(labels, np.setdiff1d(np.flatnonzero(train), labelled), settings)
    if unseen is not None:
        generator = np.random.default_rng(settings.split_seed)
        labelled = _subset(labelled, settings.pool_size, generator)
    if not len(pool) or not (len(test) or unlabelled):
        raise ValueError(
            f"the split has {len(pool)} pool and {len(test)} test images; both need at least one"
        )
    found = {"pool": pool, "labelled": labelled, "validation": validation, "test": test}
    return found, unseen


def label_problem(settings: SplitSettings) -> str | None:
    """Why a pool without labels cannot be split by these settings; None: it can."""
    if (settings.paradigm, settings.pool_ratio, settings.pool_missing) == ("ul", 1, 0):
        return None
    return (
        "paradigm: ssl or trzsl, pool_ratio and pool_missing need the classes of the pool images, "
        "but they have no labels; leave them out, or sort your images into class folders"
    )


def _shaped(labels: np.ndarray, pool: np.ndarray, settings: SplitSettings) -> np.ndarray:
    """Make the pool imbalanced, remove some classes, or reduce its size, as the settings require.

    The true labels are used only to simulate such a pool; no training uses them. `split_seed`
    determines which classes are rare or missing.
    """
    generator = np.random.default_rng([settings.split_seed, len(pool)])
    classes = generator.permutation(np.unique(labels[pool]))
    missing = int(settings.pool_missing * len(classes))
    pool = pool[~np.isin(labels[pool], classes[:missing])]
    if settings.pool_ratio > 1:
        left = classes[missing:]
        shares = settings.pool_ratio ** -(np.arange(len(left)) / max(1, len(left) - 1))
        members = [pool[labels[pool] == c] for c in left]
        kept = [
            generator.choice(of, max(1, round(share * len(of))), replace=False)
            for of, share in zip(members, shares, strict=True)
        ]
        pool = np.sort(np.concatenate(kept))
    return _subset(pool, settings.pool_size, generator)


def _subset(images: np.ndarray, size: int | None, generator: np.random.Generator) -> np.ndarray:
    """At most `size` images, sorted."""
    if size is None or size >= len(images):
        return images
    return np.sort(generator.choice(images, size, replace=False))


def _ul(labels: np.ndarray, train: np.ndarray, settings: SplitSettings) -> Chosen:
    return np.array([], dtype=np.int64), None


def _ssl(labels: np.ndarray, train: np.ndarray, settings: SplitSettings) -> Chosen:
    chosen = labelled_positions(labels[train], settings.shots, settings.split_seed)
    return np.sort(train[chosen]), None


def _trzsl(labels: np.ndarray, train: np.ndarray, settings: SplitSettings) -> Chosen:
    seen, unseen = seen_unseen(int(labels.max()) + 1, settings.class_seed)
    return train[np.isin(labels[train], seen)], unseen


PARADIGMS = {"ul": _ul, "ssl": _ssl, "trzsl": _trzsl}


def labelled_positions(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Positions of `shots` images of each class, class by class.

    The generator is seeded again for every class, as in GRIP and CPL, where the seed is 0.

    Raises:
        ValueError: a class has fewer than `shots` images.
    """
    chosen = []
    for c in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == c)
        if len(members) < shots:
            raise ValueError(
                f"SSL wants {shots} labelled images of each class, but class {c} has "
                f"{len(members)} training images; lower shots"
            )
        generator = np.random.RandomState(seed)
        chosen.append(generator.choice(members, size=shots, replace=False))
    return np.concatenate(chosen)


def seen_unseen(num_classes: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Select the seen classes of TRZSL, 62 % of all classes.

    Seen classes are in the order of the draw, unseen classes in ascending order. The published
    tables use the seeds 500, 0 and 200 (GRIP, arXiv:2306.01669).

    Raises:
        ValueError: there are fewer than four classes.

    >>> seen_unseen(6, 500)
    ((0, 3, 5), (1, 2, 4))
    """
    if num_classes < 4:
        raise ValueError(f"TRZSL needs at least 4 classes, there are {num_classes}")
    generator = np.random.RandomState(seed)
    drawn = generator.choice(range(num_classes), size=int(SEEN_SHARE * num_classes), replace=False)
    seen = tuple(int(c) for c in drawn)
    return seen, tuple(c for c in range(num_classes) if c not in seen)


def _fixed(labels: np.ndarray, parts: np.ndarray, split_seed: int) -> np.ndarray:
    """Assign free images to train or test, stratified by class, depending on the seed."""
    parts = parts.astype("<U5")
    free = np.flatnonzero(parts == "free")
    if len(free):
        size = math.ceil(TEST_SHARE * (parts != "bad").sum())
        parts[free] = "train"
        parts[free[stratified(labels[free], size, split_seed)]] = "test"
    return parts
