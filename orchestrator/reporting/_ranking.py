"""How well an objective ranked the points of a search by test accuracy. Knows numbers only.

Spearman's rank correlation, with an interval for other points of the same spaces: points are drawn
again within their cell. Cells differ in level, so pooled ranks are those within a cell, scaled to
its count of points. The percentile bootstrap is a little narrow below about ten points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# P points of a cell, B samples.

Array = npt.NDArray[Any]

FEWEST = 3  # points; two have a correlation of 1 or -1, whatever they are


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A rank correlation, in [-1, 1], with its 95 % interval."""

    rho: float | None  # None: too few points, or all of them equal
    low: float
    high: float
    points: int

    @property
    def trusted(self) -> bool:
        """Is the point with the best objective more than a guess?"""
        return self.low > 0

    def __str__(self) -> str:
        if self.rho is None:
            return f"unknown over {self.points} points"
        return f"{self.rho:.2f} [{self.low:.2f}, {self.high:.2f}] over {self.points} points"


def ranking(cells: Sequence[tuple[Array, Array]], *, samples: int = 2000, seed: int = 0) -> Ranking:
    """Does what is larger in one have more of the other, within cells?

    Args:
        cells: objectives (P,) and test accuracies (P,) of each cell's points.
    """
    points = sum(len(objectives) for objectives, _ in cells)
    unknown = Ranking(rho=None, low=-1.0, high=1.0, points=points)
    if max((len(objectives) for objectives, _ in cells), default=0) < FEWEST:
        return unknown
    rng = np.random.default_rng(seed)
    found, drawn = np.zeros((3, 1)), np.zeros((3, samples))
    for objectives, accuracies in cells:
        count = len(objectives)
        found += _products(objectives[None], accuracies[None])
        index = rng.integers(0, count, (samples, count))
        drawn += _products(objectives[index], accuracies[index])
    if not found[1:].all():
        return unknown
    rho = float(_correlations(found)[0])
    low, high = (float(end) for end in np.quantile(_correlations(drawn), [0.025, 0.975]))
    return Ranking(rho=rho, low=min(low, rho), high=max(high, rho), points=points)


def _products(one: Array, other: Array) -> Array:
    """Of centred, scaled ranks, (B, P) each: cross products and squares, (3, B)."""
    # Half a second, which a table without a search does without.
    from scipy.stats import rankdata

    x, y = (rankdata(each, axis=1) / each.shape[1] for each in (one, other))
    x, y = (each - each.mean(axis=1, keepdims=True) for each in (x, y))
    return np.stack([(x * y).sum(axis=1), (x * x).sum(axis=1), (y * y).sum(axis=1)])


def _correlations(products: Array) -> Array:
    cross, one, other = products
    scale = np.sqrt(one * other)
    # A sample of equal points ranks nothing.
    return np.asarray(np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 1e-12))


def sentences(objective: str, pooled: Ranking, by_cell: Mapping[str, Ranking]) -> Iterator[str]:
    """Which settings of a search a table shows, and why."""
    figures = f"a rank correlation with test accuracy of {pooled}"
    if pooled.trusted:
        yield (
            f"Settings chosen by {objective}, which has {figures}; "
            "no setting was picked by a test label."
        )
    elif pooled.rho is None:
        yield (
            f"Default settings: {pooled.points} points are too few, or too equal, to show whether "
            f"{objective} ranks them by test accuracy."
        )
    else:
        yield (
            f"Default settings: {objective} has {figures}, an interval that is not above 0, "
            "so the point with the best objective is a guess."
        )
    if len(by_cell) > 1:
        cells = "; ".join(f"{cell} {found}" for cell, found in by_cell.items())
        yield f"By cell: {cells}."
