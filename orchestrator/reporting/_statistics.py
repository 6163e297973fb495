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

A **p value** is read from the interval: that of level 1 - p just touches 0. A table of many
differences is **corrected** in two ways, and a difference needs both to be marked:

- Holm's procedure over all of them (Holm 1979).
- Three seeds often agree by luck, and then the runs part is 0 though seeds matter: one time in
  five where seeds vary by three times what images do. One interval can live with that, the small
  levels that Holm asks for cannot: of such tables of twelve null differences every third had a
  mark. So in a table the runs part of a difference is at least the mean runs part of all, and has
  the freedom of half of all (methods share a host, so differences are not independent).

`benchmarks/calibration.py` measures how often either is wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# R runs, U distinct images, T test images of a run, B samples, K top units (splits or seeds).

Array = npt.NDArray[Any]

Z_95 = 1.959964  # two-sided 95 %
Z_POWER_80 = 0.841621  # one-sided 80 %
ALPHA = 0.05  # of a mark, after correction

# What a mark needs, found by simulation (benchmarks/calibration.py, docs/decisions.md).
FEWEST_SEEDS = 3  # with one split, unless neither method has a seed
FEWEST_SPLITS = 4  # with more than one
FEWEST_IMAGES = 20  # on which the two differ


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


Runs = tuple[Run, ...]  # of one setting: at least one, and one for a split and seed


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over runs; fractions, not percent."""

    n: int  # runs
    n_test: int  # test images of a run
    mean: float
    std: float | None  # over runs, n - 1 in the denominator; None for one run
    low: float
    high: float
    interval: str  # what it covers: "95 % bootstrap over images and seeds (1 split)"


@dataclass(frozen=True, kw_only=True)
class Difference(Interval):
    """One method minus another, with what a test of it needs."""

    p: float  # two-sided, that it is 0; below 0.05 where the interval leaves 0 out
    skew: float  # the interval's side towards 0, over what a symmetric one would have
    image_variance: float  # of the mean, from images
    run_variance: float  # of the mean, between top units beyond images; chance puts it below 0
    run_noise: float  # what images alone put between top units, of which that is free
    units: int  # splits; seeds where there is one split
    differing: int  # images that the two did not score alike in every run
    images_needed: int | None  # to detect such a difference; None: it is 0
    reason_not_tested: str  # why too little was run for a test; empty: enough was


def mean_interval(runs: Runs, *, samples: int = 2000, seed: int = 0) -> Interval:
    """Mean accuracy over runs with its 95 % interval.

    An accuracy of exactly 0 or 1 gets an interval of width 0: reweighting cannot invent an
    error that was never seen.
    """
    scores = _each(runs)
    return _interval(scores, _parts(scores, samples, seed), lowest=0.0)


def mean_score(runs: Runs) -> float:
    """Mean accuracy over runs alone, for where an interval would be work for nothing."""
    return float(np.mean([score.plain() for score in _each(runs)]))


def paired_difference(a: Runs, b: Runs, *, samples: int = 2000, seed: int = 0) -> Difference | None:
    """Accuracy of `a` minus that of `b`, on common runs and images.

    Runs pair by split and seed; one without a seed pairs with every seed of its split.

    Returns:
        The interval of the difference; n counts pairs. None: no run in common.
    """
    scores = list(_pairs(a, b))
    if not scores:
        return None
    parts = _parts(scores, samples, seed)
    found = _interval(scores, parts, lowest=-1.0)
    towards_zero = found.mean - found.low if found.mean > 0 else found.high - found.mean
    symmetric = _half_width(ALPHA, parts.image_variance, parts.run_variance, parts.units - 1)
    skew = towards_zero / symmetric if symmetric > 0 else 1.0
    differing = [score.sides[0] != score.sides[1] for score in scores]
    images = len(
        np.unique(np.concatenate([s.image_ids[d] for s, d in zip(scores, differing, strict=True)]))
    )
    discordance = float(np.mean([d.mean() for d in differing]))
    return Difference(
        **vars(found),
        p=_p_value(
            abs(found.mean) / skew if skew > 0 else math.inf,
            parts.image_variance,
            parts.run_variance,
            parts.units - 1,
        ),
        skew=skew,
        image_variance=parts.image_variance,
        run_variance=parts.run_variance,
        run_noise=parts.run_noise,
        units=parts.units,
        differing=images,
        images_needed=images_needed(found.mean, discordance),
        reason_not_tested=_reason_not_tested(scores, images),
    )


def corrected(differences: Sequence[Difference]) -> list[float]:
    """p values of differences that stand in one table, in their order.

    Holm's, with a runs part that the differences know together; never below `p` itself. A table of
    one has nobody to know it from, so half of what image noise puts between seeds stays in.
    """
    units = [d for d in differences if d.units > 1]
    kept = 0.5 if len(units) == 1 else 0.0
    runs = [d.run_variance + kept * d.run_noise for d in units]
    common = max(0.0, float(np.mean(runs))) if runs else 0.0
    freedom = sum(d.units - 1 for d in units) / 2
    together = []
    for d in differences:
        own = d.run_variance + kept * d.run_noise
        part = max(own, common) if d.units > 1 else 0.0
        distance = abs(d.mean) / d.skew if d.skew > 0 else math.inf
        together.append(_p_value(distance, d.image_variance, part, max(d.units - 1, freedom)))
    return [max(d.p, p) for d, p in zip(differences, holm(together), strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """A run far below the others of its setting."""

    split_seed: int
    seed: int | None
    score: float
    others: float  # their median


def collapsed(runs: Runs) -> list[Collapse]:
    """Runs that fell: training diverged, or a prompt went to one class.

    Such a run lies below the median of the others by more than 10 points or a quarter of that
    median, whichever is less; by more than 5 of their robust standard deviations (1.48 times the
    median distance from the median); and by more than 4 standard errors of an accuracy on its test
    images. Fewer than three runs say nothing, nor do as many that fell as did not.
    """
    scores = [score.plain() for score in _each(runs)]
    found = []
    for i, (run, score) in enumerate(zip(runs, scores, strict=True)):
        others = np.array(scores[:i] + scores[i + 1 :])
        if len(others) < 2:
            break
        median = float(np.median(others))
        spread = 1.4826 * float(np.median(np.abs(others - median)))
        noise = math.sqrt(median * (1 - median) / len(run.correct))
        if median - score > max(min(0.10, median / 4), 5 * spread, 4 * noise):
            found.append(
                Collapse(split_seed=run.split_seed, seed=run.seed, score=score, others=median)
            )
    return found


def images_needed(difference: float, discordance: float) -> int | None:
    """Test images on which one pair of runs would show such a difference.

    For McNemar's test, two-sided 5 %, power 80 %, with discordance p and difference d:
    n = (1.96 sqrt(p) + 0.84 sqrt(p - d^2))^2 / d^2 (Connor 1987, Biometrics 43:207-211).
    It takes the observed difference for the true one and leaves the variation over splits and
    seeds out; averaging over several runs needs fewer images.

    Args:
        discordance: share of the test images on which one of the two is right and the other wrong.

    Returns:
        None: no number of images is enough, the difference is 0.

    >>> images_needed(0.02, 0.20)
    3923
    """
    if difference == 0:
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

    @property
    def groups(self) -> list[Array]:
        """(T,) each: images whose accuracy counts on its own."""
        if self.unseen is None:
            return [np.ones(len(self.image_ids), dtype=bool)]
        return [self.unseen, ~self.unseen]

    def columns(self) -> list[Array]:
        """(T,) each: what `score` needs the sums of."""
        right = [side & group for side in self.sides for group in self.groups]
        return [*self.groups, *right]

    def score(self, sums: Sequence[Array]) -> Array:
        """An accuracy or the harmonic mean of two, or a difference of such."""
        count = 1 if self.unseen is None else 2
        sizes, rights = sums[:count], [sums[i : i + count] for i in range(count, len(sums), count)]
        found = []
        for right in rights:
            one, *others = (part / size for part, size in zip(right, sizes, strict=True))
            for other in others:
                one = 2 * one * other / np.maximum(one + other, 1e-12)
            found.append(one)
        return np.asarray(found[0] - found[1] if len(found) == 2 else found[0])

    def plain(self) -> float:
        """The score of the images as they are."""
        return float(self.score([np.asarray(column.sum()) for column in self.columns()]))


def _each(runs: Runs) -> list[_Scores]:
    return [
        _Scores(run.split_seed, run.seed, run.image_ids, (run.correct,), run.unseen) for run in runs
    ]


def _pairs(a: Runs, b: Runs) -> Iterator[_Scores]:
    for left in a:
        for right in b:
            seeds = {left.seed, right.seed} - {None}
            if left.split_seed != right.split_seed or len(seeds) > 1:
                continue
            ids, i, j = np.intersect1d(left.image_ids, right.image_ids, return_indices=True)
            if len(ids):
                sides = (left.correct[i], right.correct[j])
                unseen = None if left.unseen is None else left.unseen[i]
                yield _Scores(left.split_seed, next(iter(seeds), None), ids, sides, unseen)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    """What varies in a mean over runs."""

    run_means: Array  # (R,)
    draws: Array  # (B,) of the mean, around 0
    image_variance: float
    run_variance: float  # not floored; 0 for one unit
    run_noise: float
    units: int  # K


def _parts(scores: Sequence[_Scores], samples: int, seed: int) -> _Parts:
    run_means = np.array([s.plain() for s in scores])  # (R,)
    shifts = _resampled_means(scores, samples, seed) - run_means  # (B, R), images only
    units = _units(scores)  # (R, K)
    share = units.sum(axis=0) / len(scores)  # (K,)
    per_unit = units / units.sum(axis=0)  # (R, K): run means -> unit means

    draws = shifts.mean(axis=1)  # (B,)
    image_variance = float(draws.var())
    between = by_images = 0.0
    if len(share) > 1:
        between = float(_variance_of_mean(run_means @ per_unit, share))
        by_images = float(_variance_of_mean(shifts @ per_unit, share).mean())
        deviation = math.sqrt(max(0.0, between - by_images))
        widen = _student(ALPHA, len(share) - 1) / Z_95
        draws = draws + widen * deviation * _generator(seed, "runs").standard_normal(samples)
    return _Parts(
        run_means=run_means,
        draws=draws,
        image_variance=image_variance,
        run_variance=between - by_images,
        run_noise=by_images,
        units=len(share),
    )


def _interval(scores: Sequence[_Scores], parts: _Parts, *, lowest: float) -> Interval:
    mean = float(parts.run_means.mean())
    low, high = mean + np.quantile(parts.draws, [0.025, 0.975])
    return Interval(
        mean=mean,
        std=float(parts.run_means.std(ddof=1)) if len(scores) > 1 else None,
        low=max(lowest, min(float(low), mean)),
        high=min(1.0, max(float(high), mean)),
        n=len(scores),
        n_test=round(float(np.mean([len(s.image_ids) for s in scores]))),
        interval=_covered(scores),
    )


def _half_width(alpha: float, images: float, runs: float, freedom: float) -> float:
    """Half the width of a symmetric interval of level 1 - alpha, of two variances."""
    t = _student(alpha, freedom) if runs > 0 else 0.0
    return math.sqrt(_normal(alpha) ** 2 * images + t**2 * max(0.0, runs))


def _p_value(distance: float, images: float, runs: float, freedom: float) -> float:
    """The level at which the half width is the distance from 0."""
    if distance == 0:
        return 1.0
    if runs <= 0:
        return math.erfc(distance / math.sqrt(2 * images)) if images > 0 else 0.0
    from scipy.special import stdtr

    low, high = 0.0, distance / math.sqrt(runs)  # t of the level lies between
    for _ in range(60):
        t = (low + high) / 2
        alpha = 2 * float(stdtr(freedom, -t))
        if _normal(alpha) ** 2 * images + t**2 * runs < distance**2:
            low = t
        else:
            high = t
    return 2 * float(stdtr(freedom, -low))


# scipy.special takes a tenth of a second to import, which only a table needs.


def _normal(alpha: float) -> float:
    """z of a two-sided level."""
    from scipy.special import ndtri

    return -float(ndtri(max(alpha, 1e-300) / 2))


def _student(alpha: float, freedom: float) -> float:
    """Student's t of a two-sided level."""
    from scipy.special import stdtrit

    return -float(stdtrit(freedom, alpha / 2))


def _reason_not_tested(scores: Sequence[_Scores], differing: int) -> str:
    """Why a difference is not tested, however large it is; empty: it is."""
    splits = len({s.split_seed for s in scores})
    seeds = {s.seed for s in scores}
    if 1 < splits < FEWEST_SPLITS:
        return f"{splits} splits are too few for a test, which needs one, or {FEWEST_SPLITS}"
    if splits == 1 and seeds != {None} and len(seeds) < FEWEST_SEEDS:
        few = "1 seed is" if len(seeds) == 1 else f"{len(seeds)} seeds are"
        return f"{few} too few for a test, which needs {FEWEST_SEEDS}"
    if differing < FEWEST_IMAGES:
        return f"they differ on {differing} images, too few for a test, which needs {FEWEST_IMAGES}"
    return ""


def _resampled_means(scores: Sequence[_Scores], samples: int, seed: int) -> Array:
    """Scores of the runs under common random weights of the images, (B, R)."""
    ids = np.unique(np.concatenate([s.image_ids for s in scores]))
    weights = _image_weights(len(ids), samples, seed)  # (B, U)
    columns = [s.columns() for s in scores]
    ends = np.cumsum([len(of_one) for of_one in columns])
    matrix = np.zeros((len(ids), ends[-1]), dtype=np.float32)
    for s, of_one, end in zip(scores, columns, ends, strict=True):
        matrix[np.searchsorted(ids, s.image_ids), end - len(of_one) : end] = np.stack(
            of_one, axis=1
        )
    sums = (weights @ matrix).T  # of all runs at once: a hundred rows are a second, not ten
    each = zip(scores, np.split(sums, ends[:-1]), strict=True)
    return np.stack([s.score(list(own)) for s, own in each], axis=1).astype(np.float64)


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


def _covered(scores: Sequence[_Scores]) -> str:
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
