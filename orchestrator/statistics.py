"""Accuracies and differences of accuracies with 95 % intervals. Knows predictions, no files.

What varies: a **run** is one split and one seed; it scores every test image of its split. Images
are *crossed* with splits and seeds (splits draw from one dataset, so an image comes back in many
of them); seeds are *nested* in splits. An interval for new images, new splits and new seeds adds
two parts:

- **images**: all images of the dataset that were tested are reweighted at random, an image with
  the same weight in every run (the Bayesian bootstrap, Rubin 1981: weights are exponential, so
  that no sample leaves a run without images). The runs stay as they are.
- **runs**: the variance between the top units (splits; seeds where there is one split) divided by
  their number. What image noise alone would put between them is measured in the same samples and
  subtracted, since the first part holds it already. This part is drawn from a normal
  distribution, widened by Student's t over z for its k - 1 degrees of freedom.

Why not redraw images, splits and seeds together and take percentiles? Noise that belongs to one
image in one run is then counted three times (Owen 2007, "The pigeonhole bootstrap"), seeds count
in their own level and again between splits (Davison and Hinkley 1997, section 3.8), and k redrawn
units fall short of their variance by the factor (k - 1)/k. In simulations such intervals covered
anything from 72 to 100 %, depending on which source of variation was the largest.

Coverage of the intervals here in %, for the difference of two methods that are equally good: 540
test images out of 1,797, both methods right on about 74 % of them, 1,000 repetitions. Columns:
standard deviation of a method's accuracy over seeds / over splits, in points.

| splits x seeds | 0 / 0 | 0.9 / 0 | 1.8 / 0 | 0.9 / 1.8 | 0.9 / 4.4 |
| -------------- | ----- | ------- | ------- | --------- | --------- |
| 1 x 3          | 96.3  | 95.2    | 94.0    |           |           |
| 5 x 2          | 96.0  | 96.5    | 95.1    | 94.0      | 94.6      |
| 3 x 1          | 97.1  | 94.9    | 91.8    | 92.0      | 92.8      |
| 2 x 2          | 96.0  | 94.7    | 91.6    | 87.9      | 89.1      |

Two splits are too few where splits matter: the interval is wide and still covers too little.
An interval says nothing of what was the same in every run: the pretrained models and, with one
split, its LoRA and its images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# R runs, U distinct images, T test images of a run, B samples, K top units (splits or seeds).

Array = npt.NDArray[Any]

Z_95 = 1.959964  # two-sided 95 %
Z_POWER_80 = 0.841621  # one-sided 80 %


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One trained classifier on the test images of its split.

    seed: None for a method that draws nothing: one computation stands for every seed.
    """

    split_seed: int
    seed: int | None
    image_ids: Array  # (T,) index in the dataset, so that images can be paired
    correct: Array  # (T,) bool
    unseen: Array | None = None  # (T,) bool: TRZSL, scored by the harmonic mean of the two parts

    def __post_init__(self) -> None:
        if len(self.image_ids) != len(self.correct) or len(self.correct) == 0:
            raise ValueError(
                f"split {self.split_seed}, seed {self.seed}: {len(self.image_ids)} images, "
                f"{len(self.correct)} outcomes; need as many outcomes as images, at least one"
            )


@dataclass(frozen=True, eq=False)
class Runs:
    """All runs of one setting."""

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        found = [(run.split_seed, run.seed) for run in self.runs]
        if not found or len(set(found)) < len(found):
            raise ValueError(f"(split, seed) of runs: {found}; need at least one, each once")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over runs; fractions, not percent."""

    mean: float
    std: float  # over runs, n - 1 in the denominator; nan for one run
    low: float
    high: float
    n: int  # runs
    n_test: int  # test images of a run
    method: str  # "95 % bootstrap over images and seeds (1 split)"


def mean_interval(runs: Runs, *, samples: int = 2000, seed: int = 0) -> Interval:
    """Mean accuracy over runs with its 95 % interval.

    An accuracy of exactly 0 or 1 gets an interval of width 0: reweighting cannot invent an
    error that was never seen.
    """
    return _interval(_each(runs), lowest=0.0, samples=samples, seed=seed)


def mean_score(runs: Runs) -> float:
    """Mean accuracy over runs alone, for where an interval would be work for nothing."""
    return float(np.mean([score.values(_mean) for score in _each(runs)]))


def paired_difference(a: Runs, b: Runs, *, samples: int = 2000, seed: int = 0) -> Interval | None:
    """Accuracy of `a` minus that of `b`, on common runs and images.

    Runs pair by split and seed; one without a seed pairs with every seed of its split.

    Returns:
        The interval of the difference; n counts pairs. None: no run in common.
    """
    scores = list(_pairs(a, b))
    return _interval(scores, lowest=-1.0, samples=samples, seed=seed) if scores else None


def discordance(a: Runs, b: Runs) -> float:
    """Share of test images on which one of the two is right and the other wrong, mean over pairs.

    nan: no run in common.
    """
    shares = [float((pair.sides[0] != pair.sides[1]).mean()) for pair in _pairs(a, b)]
    return float(np.mean(shares)) if shares else math.nan


def images_needed(difference: float, discordance: float) -> int | None:
    """Test images on which one pair of runs would show such a difference.

    For McNemar's test, two-sided 5 %, power 80 %, with discordance p and difference d:
    n = (1.96 sqrt(p) + 0.84 sqrt(p - d^2))^2 / d^2 (Connor 1987, Biometrics 43:207-211).
    It takes the observed difference for the true one and leaves the variation over splits and
    seeds out; averaging over several runs needs fewer images.

    Returns:
        None: no number of images is enough, the difference is 0 or unknown.

    >>> images_needed(0.02, 0.20)
    3923
    """
    if difference == 0 or math.isnan(difference) or math.isnan(discordance):
        return None
    p = max(discordance, abs(difference))  # a difference needs at least that many discordant images
    root = Z_95 * math.sqrt(p) + Z_POWER_80 * math.sqrt(p - difference**2)
    return math.ceil(root**2 / difference**2)


@dataclass(frozen=True, eq=False)
class _Scores:
    """A run, or a pair of runs of which the second is subtracted, image by image."""

    split_seed: int
    seed: int | None
    image_ids: Array  # (T,)
    sides: tuple[Array, ...]  # one or two of (T,) bool: right or wrong
    unseen: Array | None  # (T,) bool

    def values(self, weighted_mean: Callable[[Array], Array]) -> Array:
        """The score, from means over images: of an accuracy, or of the harmonic mean of two."""
        found = [self._score(side.astype(np.float32), weighted_mean) for side in self.sides]
        return found[0] - found[1] if len(found) == 2 else found[0]

    def _score(self, side: Array, weighted_mean: Callable[[Array], Array]) -> Array:
        if self.unseen is None:
            return weighted_mean(side)
        parts = [part.astype(np.float32) for part in (self.unseen, ~self.unseen)]
        one, other = (weighted_mean(side * part) / weighted_mean(part) for part in parts)
        return 2 * one * other / np.maximum(one + other, 1e-12)


def _each(runs: Runs) -> list[_Scores]:
    return [
        _Scores(run.split_seed, run.seed, run.image_ids, (run.correct,), run.unseen)
        for run in runs.runs
    ]


def _pairs(a: Runs, b: Runs) -> Iterator[_Scores]:
    for left in a.runs:
        for right in b.runs:
            seeds = {left.seed, right.seed} - {None}
            if left.split_seed != right.split_seed or len(seeds) > 1:
                continue
            ids, i, j = np.intersect1d(left.image_ids, right.image_ids, return_indices=True)
            if len(ids):
                sides = (left.correct[i], right.correct[j])
                unseen = None if left.unseen is None else left.unseen[i]
                yield _Scores(left.split_seed, next(iter(seeds), None), ids, sides, unseen)


def _interval(scores: Sequence[_Scores], *, lowest: float, samples: int, seed: int) -> Interval:
    run_means = np.array([float(s.values(_mean)) for s in scores])  # (R,)
    shifts = _resampled_means(scores, samples, seed) - run_means  # (B, R), images only
    units = _units(scores)  # (R, K)
    share = units.sum(axis=0) / len(scores)  # (K,)
    per_unit = units / units.sum(axis=0)  # (R, K): run means -> unit means

    draws = shifts.mean(axis=1)  # (B,)
    if len(share) > 1:
        between = _variance_of_mean(run_means @ per_unit, share)
        by_images = _variance_of_mean(shifts @ per_unit, share).mean()
        deviation = math.sqrt(max(0.0, float(between - by_images)))
        widen = _student_975(len(share) - 1) / Z_95
        draws = draws + widen * deviation * _generator(seed, "runs").standard_normal(samples)

    mean = float(run_means.mean())
    low, high = mean + np.quantile(draws, [0.025, 0.975])
    return Interval(
        mean=mean,
        std=float(run_means.std(ddof=1)) if len(scores) > 1 else math.nan,
        low=max(lowest, min(float(low), mean)),
        high=min(1.0, max(float(high), mean)),
        n=len(scores),
        n_test=round(float(np.mean([len(s.image_ids) for s in scores]))),
        method=_method(scores),
    )


def _resampled_means(scores: Sequence[_Scores], samples: int, seed: int) -> Array:
    """Scores of the runs under common random weights of the images, (B, R)."""
    ids = np.unique(np.concatenate([s.image_ids for s in scores]))
    weights = _image_weights(len(ids), samples, seed)  # (B, U)
    found = []
    for s in scores:
        same = np.array_equal(ids, s.image_ids)  # a fixed test set: no copy of its weights
        own = weights if same else weights[:, np.searchsorted(ids, s.image_ids)]  # (B, T)
        total = own @ np.ones(len(s.image_ids), dtype=np.float32)
        found.append(s.values(functools.partial(_weighted, own, total)))
    return np.stack(found, axis=1).astype(np.float64)


def _weighted(weights: Array, total: Array, values: Array) -> Array:
    return np.asarray(weights @ values / total)


def _mean(values: Array) -> Array:
    return np.asarray(values.mean(dtype=np.float64))


@functools.lru_cache(maxsize=2)  # rows of one table share their test images, so 100 rows draw once
def _image_weights(images: int, samples: int, seed: int) -> Array:
    generator = _generator(seed, "images")
    return generator.standard_exponential((samples, images), dtype=np.float32)


def _generator(seed: int, part: str) -> np.random.Generator:
    return np.random.default_rng([seed, {"images": 0, "runs": 1}[part]])


def _units(scores: Sequence[_Scores]) -> Array:
    """Which top unit a run belongs to, (R, K) of 0 and 1: its split, or with one split itself."""
    splits = np.array([s.split_seed for s in scores])
    names, index = np.unique(splits, return_inverse=True)
    return np.eye(len(names))[index] if len(names) > 1 else np.eye(len(scores))


def _variance_of_mean(values: Array, share: Array) -> Array:
    """Variance of the weighted mean of K independent units from their spread, (..., K) -> (...).

    With equal shares this is the sample variance (K - 1 in the denominator) over K.
    """
    k = len(share)
    deviations = values - (values @ share)[..., None]
    return np.asarray(k / (k - 1) * (deviations**2 @ share**2))


_STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def _student_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    if freedom <= len(_STUDENT_975):
        return _STUDENT_975[freedom - 1]
    z = Z_95  # Abramowitz and Stegun 26.7.5, two terms: 0.003 off at 10 degrees of freedom
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _method(scores: Sequence[_Scores]) -> str:
    splits = len({s.split_seed for s in scores})
    seeds = len({s.seed for s in scores} - {None})
    over, only = ["images"], []
    if splits > 1:
        over.append("splits")
    else:
        only.append("1 split")
    if seeds > 1:
        over.append("seeds")
    elif seeds == 1:
        only.append("1 seed")
    text = " and ".join(filter(None, [", ".join(over[:-1]), over[-1]]))
    return f"95 % bootstrap over {text}" + (f" ({', '.join(only)})" if only else "")
