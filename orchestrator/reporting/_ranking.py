"""How well an objective ranks the points of a search by test accuracy.

The measure is Spearman's rank correlation with a bootstrap interval for other points of the same
search spaces: points are resampled within their cell. Cells differ in their level of accuracy, so
ranks are taken within a cell and divided by its number of points before they are pooled. The
percentile bootstrap is slightly too narrow below about ten points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# P points of a cell, B samples.

Array = npt.NDArray[Any]

FEWEST = 3  # points; the correlation of two points is always 1 or -1


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A rank correlation, in [-1, 1], with its 95 % interval."""

    rho: float | None  # None: too few points, or all points are equal
    low: float
    high: float
    points: int

    @property
    def predicts_accuracy(self) -> bool:
        """Whether the objective predicts test accuracy: the whole interval is above 0."""
        return self.low > 0

    def __str__(self) -> str:
        if self.rho is None:
            return f"unknown over {self.points} points"
        return f"{self.rho:.2f} [{self.low:.2f}, {self.high:.2f}] over {self.points} points"


def ranking(cells: Sequence[tuple[Array, Array]], *, samples: int = 2000) -> Ranking:
    """Rank correlation of objective and test accuracy within cells, pooled over cells.

    Args:
        cells: objectives (P,) and test accuracies (P,) of the points of each cell.
    """
    points = sum(len(objectives) for objectives, _ in cells)
    unknown = Ranking(rho=None, low=-1.0, high=1.0, points=points)
    if max((len(objectives) for objectives, _ in cells), default=0) < FEWEST:
        return unknown
    rng = np.random.default_rng(0)
    observed, resampled = np.zeros((3, 1)), np.zeros((3, samples))
    for objectives, accuracies in cells:
        count = len(objectives)
        observed += _products(objectives[None], accuracies[None])
        index = rng.integers(0, count, (samples, count))
        resampled += _products(objectives[index], accuracies[index])
    if not observed[1:].all():
        return unknown
    rho = float(_correlations(observed)[0])
    low, high = (float(end) for end in np.quantile(_correlations(resampled), [0.025, 0.975]))
    return Ranking(rho=rho, low=min(low, rho), high=max(high, rho), points=points)


def _products(objectives: Array, accuracies: Array) -> Array:
    """Cross products and squares (3, B) of the centred, scaled ranks of (B, P) each."""
    from scipy.stats import rankdata  # takes half a second; only searches need it

    x, y = (rankdata(each, axis=1) / each.shape[1] for each in (objectives, accuracies))
    x, y = (each - each.mean(axis=1, keepdims=True) for each in (x, y))
    return np.stack([(x * y).sum(axis=1), (x * x).sum(axis=1), (y * y).sum(axis=1)])


def _correlations(products: Array) -> Array:
    cross, x_squares, y_squares = products
    scale = np.sqrt(x_squares * y_squares)
    # A sample of equal points has no ranking; its correlation counts as 0.
    return np.asarray(np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 1e-12))


def ranking_sentences(
    objective: str, pooled: Ranking, by_cell: Mapping[str, Ranking]
) -> Iterator[str]:
    """Sentences on which settings of a search a table shows, and why."""
    correlation = f"a rank correlation with test accuracy of {pooled}"
    if pooled.predicts_accuracy:
        yield (
            f"Settings chosen by {objective}, which has {correlation}; "
            "test labels did not choose any setting."
        )
    elif pooled.rho is None:
        yield (
            f"Default settings: {pooled.points} points are too few, or too similar, to show "
            f"whether {objective} ranks them by test accuracy."
        )
    else:
        yield (
            f"Default settings: {objective} has {correlation}. The interval is not above 0, so "
            "the objective does not predict which point is best."
        )
    if len(by_cell) > 1:
        cells = "; ".join(f"{cell} {ranking}" for cell, ranking in by_cell.items())
        yield f"By cell: {cells}."
