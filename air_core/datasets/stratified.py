"""A random part of a dataset that has each class in proportion."""

from __future__ import annotations

import numpy as np


def stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The test part of scikit-learn's stratified `train_test_split` with the same seed.

    Importing scikit-learn would take a second in each process.

    Args:
        labels: (N,) classes.
        size: number of images in the test part.

    Returns:
        (size,) positions, by class.

    Raises:
        ValueError: a class has one image, or a part has fewer images than there are classes.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if (rarest := counts.min()) < 2 or min(size, len(labels) - size) < len(classes):
        raise ValueError(
            f"{len(labels)} images, {rarest} of the rarest class, are too few for train and test"
        )
    generator = np.random.RandomState(seed)
    train = _proportional(counts, len(labels) - size, generator)
    test = _proportional(counts - train, size, generator)
    drawn = []
    for c, skipped, taken in zip(classes, train, test, strict=True):
        members = generator.permutation(np.flatnonzero(labels == c))
        drawn.append(members[skipped : skipped + taken])
    return np.concatenate(drawn)


def _proportional(counts: np.ndarray, total: int, generator: np.random.RandomState) -> np.ndarray:
    """Distribute `total` in proportion to counts. The largest remainders are rounded up, drawn at
    random where they are equal."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    rest = exact - shares
    for remainder in np.unique(rest)[::-1]:
        lacking = int(total - shares.sum())
        if not lacking:
            break
        equal = np.flatnonzero(rest == remainder)
        shares[generator.choice(equal, min(len(equal), lacking), replace=False)] += 1
    return np.asarray(shares, dtype=int)
