"""Accuracies and differences of accuracies with 95 % intervals.

A **run** is one split and one seed; it scores every test image of its split. Images are *crossed*
with splits and seeds (splits draw from one dataset, so an image occurs in many of them); seeds are
*nested* in splits. An interval for new images, new splits and new seeds adds two parts:

- **images**: all tested images of the dataset are reweighted at random. An image has the same
  weight in every run. The weights are exponential (the Bayesian bootstrap, Rubin 1981), so no
  sample leaves a run without images. The set of runs is fixed.
- **runs**: the variance between the top units (splits; seeds if there is one split) divided by
  their number. The variance that image noise alone causes between units is measured in the same
  samples and subtracted, because the first part contains it already. This part is drawn from a
  normal distribution, widened by Student's t over z for its k - 1 degrees of freedom.

Resampling images, splits and seeds together and taking percentiles would be wrong: noise of one
image in one run is then counted three times (Owen 2007, "The pigeonhole bootstrap"), seeds count
at their own level and again between splits (Davison and Hinkley 1997, section 3.8), and k resampled
units underestimate their variance by the factor (k - 1)/k. Such intervals covered 72 to 100 %.

An interval does not include variation of inputs that all runs share: the pretrained models and,
with one split, its LoRA and its synthetic images.

The **p value** of a difference is the level at which its interval, at 1 - p, just touches 0. The p
values of a table are **corrected** in two ways, and a significant difference passes both. (A table
is here the differences of one dataset, paradigm and modality: `orchestrator.reporting.rows`.)

- Holm's procedure over the differences with hosts, those with controls, and those between values of
  a setting (Holm 1979).
- A common runs part. Three seeds often agree by chance, and the runs part is then 0 although seeds
  matter: one time in five if seeds vary three times as much as images. That is tolerable for a
  single interval but not at the small levels of Holm's procedure: every third of such tables of
  twelve null differences had a mark. In a table the runs part of a difference is therefore at
  least the mean runs part of all differences, with half of their summed degrees of freedom
  (methods share a host, so differences are not independent).

`benchmarks/README.md` has the coverage of intervals and the error rates of tests, by simulation.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# R runs, U distinct images, T test images of a run, B samples, K top units (splits or seeds).

Array = npt.NDArray[Any]

Z_95 = 1.959964  # two-sided 95 %
Z_POWER_80 = 0.841621  # one-sided 80 %
ALPHA = 0.05  # level of significance, after correction
SAMPLES = 2000
SEED_OF_IMAGES, SEED_OF_RUNS = [0, 0], [0, 1]  # of the random numbers of the two parts

Verdict = Literal["higher", "lower", "not significant", "not tested"]

# Minimum for a test, determined by simulation (benchmarks/README.md).
FEWEST_SEEDS = 3  # with one split, unless neither method uses the seed
FEWEST_SPLITS = 4  # with more than one split
FEWEST_IMAGES = 20  # on which the two methods differ


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A trained classifier on the test images of its split.

    The seed is None for a method that ignores it: one run then counts for every seed.
    """

    split_seed: int | str
    seed: int | None
    image_ids: Array  # (T,) index in the dataset, so that images can be paired
    correct: Array  # (T,) bool
    unseen: Array | None = None  # (T,) bool: TRZSL, scored by the harmonic mean of the two parts
    # Scores under random weights, (B,), by images and samples: a run is compared several times.
    resampled: dict[tuple[int, int], Array] = field(default_factory=dict, init=False)

    @functools.cached_property
    def columns(self) -> Array:
        """(2 G, T) bool: all images, in TRZSL the unseen and the seen ones; then the right ones of
        these.
        """
        every = np.ones((1, len(self.image_ids)), dtype=bool)
        groups = every if self.unseen is None else np.stack([self.unseen, ~self.unseen])
        return np.concatenate([groups, self.correct & groups])

    def score(self, sums: Array) -> Array:
        """The accuracy (TRZSL: harmonic mean of two accuracies).

        Args:
            sums: the (weighted) sum over images of each of `columns`.
        """
        groups = len(sums) // 2
        score, *rest = sums[groups:] / sums[:groups]
        for other in rest:
            score = 2 * score * other / np.maximum(score + other, 1e-12)
        return np.asarray(score)

    @functools.cached_property
    def plain(self) -> float:
        """The score with equal weights of all images."""
        return float(self.score(self.columns.sum(axis=1)))


Runs = tuple[Run, ...]  # of one setting: at least one, at most one per split and seed


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over runs; fractions, not percent."""

    n: int  # runs
    n_test: int  # test images of a run
    mean: float
    std: float | None  # over runs, n - 1 in the denominator; None for one run
    low: float
    high: float
    interval: str  # description: "95 % bootstrap over images and seeds (1 split)"
    # Variances of the mean: from images; between top units, without image noise (below 0 by
    # chance); between them from image noise, which is not in `run_variance`.
    image_variance: float = 0.0
    run_variance: float = 0.0
    run_noise: float = 0.0
    units: int = 1  # number of splits; of seeds if there is one split


@dataclass(frozen=True, kw_only=True)
class Difference(Interval):
    """One method minus another, with the quantities that its significance test needs."""

    p: float  # two-sided, of no difference; below 0.05 if the interval excludes 0
    skew: float  # width of the interval's side towards 0, relative to a symmetric interval
    reason_not_tested: str  # why there is too little data for a test; empty: it is tested


def mean_interval(runs: Runs, *, samples: int = SAMPLES) -> Interval:
    """Mean accuracy over runs with its 95 % interval.

    An accuracy of exactly 0 or 1 has an interval of width 0, because reweighting images cannot
    produce an error that no run made.
    """
    return _interval(runs, samples=samples, lowest=0.0)


def mean_score(runs: Sequence[Run]) -> float:
    """Mean accuracy over runs, without the cost of an interval."""
    return float(np.mean([run.plain for run in runs]))


def paired_difference(a: Runs, b: Runs, *, samples: int = SAMPLES) -> Difference | None:
    """Accuracy of `a` minus accuracy of `b`, on common runs and images.

    Runs are paired by split and seed; a run without a seed pairs with every seed of its split.

    Returns:
        The difference with its interval, where n counts pairs; None if no runs pair.
    """
    pairs = [*_paired(a, b)]
    if not pairs:
        return None
    ones, others = zip(*pairs, strict=True)
    interval = _interval(ones, others, samples=samples, lowest=-1.0)
    mean, spread = interval.mean, _spread(interval)
    towards_zero = mean - interval.low if mean > 0 else interval.high - mean
    symmetric = _half_width(ALPHA, *spread)
    skew = towards_zero / symmetric if symmetric > 0 else 1.0
    differing = [one.image_ids[one.correct != other.correct] for one, other in pairs]
    return Difference(
        **vars(interval),
        p=_p_value(mean, skew, *spread),
        skew=skew,
        reason_not_tested=_reason_not_tested(
            (*ones, *others), len(np.unique(np.concatenate(differing)))
        ),
    )


def table_tests(
    differences: Sequence[Difference], questions: Sequence[str] = ()
) -> list[tuple[float, float]]:
    """Corrected p value and detectable difference of each difference of one table.

    The p value has Holm's adjustment, with a common runs part; it is never below the `p` of the
    difference. Detectable is the smallest true difference, a fraction, that the test detects with
    80 % power: that is significant at `ALPHA` over the number of differences of its question, the
    first level of Holm's procedure, with the images, splits and seeds at hand.

    Args:
        questions: of each difference; the adjustment is within a question. Empty: one for all.
    """
    questions = questions or [""] * len(differences)
    sizes = Counter(questions)
    p_values, detectable = [], []
    runs_parts = _runs_parts(differences)
    for d, question, (runs, dof) in zip(differences, questions, runs_parts, strict=True):
        p_values.append(_p_value(d.mean, d.skew, d.image_variance, runs, dof))
        half = _half_width(ALPHA / sizes[question], d.image_variance, runs, dof)
        deviation = math.sqrt(d.image_variance + max(0.0, runs))
        detectable.append(max(half, _half_width(ALPHA, *_spread(d))) + Z_POWER_80 * deviation)
    adjusted: dict[int, float] = {}
    for question in sizes:
        same = [i for i, other in enumerate(questions) if other == question]
        adjusted |= zip(same, holm([p_values[i] for i in same]), strict=True)
    return [(max(d.p, adjusted[i]), detectable[i]) for i, d in enumerate(differences)]


def verdict(difference: Difference, p_corrected: float) -> Verdict:
    """The result of the test of a difference. All words, marks and colours follow it."""
    if difference.reason_not_tested:
        return "not tested"
    if p_corrected >= ALPHA:
        return "not significant"
    return "higher" if difference.mean > 0 else "lower"


def _runs_parts(differences: Sequence[Difference]) -> Iterator[tuple[float, float]]:
    """Variance between runs and its degrees of freedom in the test of each difference of a table.

    A single difference has no others to take a common runs part from, so half of the variance that
    image noise causes between its seeds is added to it instead.
    """
    with_units = [d for d in differences if d.units > 1]
    noise_share = 0.5 if len(with_units) == 1 else 0.0
    runs = [d.run_variance + noise_share * d.run_noise for d in with_units]
    common = max(0.0, float(np.mean(runs))) if runs else 0.0
    common_dof = sum(d.units - 1 for d in with_units) / 2
    for d in differences:
        variance = d.run_variance + noise_share * d.run_noise
        yield max(variance, common) if d.units > 1 else 0.0, max(d.units - 1, common_dof)


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


def _paired(a: Runs, b: Runs) -> Iterator[tuple[Run, Run]]:
    """Runs of two settings with the same split and seed, on the images that both tested.

    A run without a seed is paired with every seed of its split.
    """
    for one, other in itertools.product(a, b):
        is_same_seed = one.seed == other.seed or None in (one.seed, other.seed)
        if one.split_seed != other.split_seed or not is_same_seed:
            continue
        if not np.array_equal(one.image_ids, other.image_ids):
            ids = np.intersect1d(one.image_ids, other.image_ids)
            one, other = _on_images(one, ids), _on_images(other, ids)
        if len(one.image_ids):
            yield one, other


def _on_images(run: Run, ids: Array) -> Run:
    """A run on some of its images."""
    at = np.intersect1d(run.image_ids, ids, return_indices=True)[1]
    unseen = None if run.unseen is None else run.unseen[at]
    return replace(run, image_ids=ids, correct=run.correct[at], unseen=unseen)


def _interval(runs: Runs, minus: Runs = (), *, samples: int, lowest: float) -> Interval:
    """The interval of the mean over runs; with `minus`, of their differences from those runs."""
    scores = np.array([run.plain for run in (*runs, *minus)])
    resampled = _resampled_scores((*runs, *minus), samples)
    if minus:
        scores, resampled = (x[: len(runs)] - x[len(runs) :] for x in (scores, resampled))
    shifts = resampled - scores[:, None]  # (R, B), images only
    units = _units(runs)  # (K, R)
    share = units.sum(axis=1) / len(runs)  # (K,)
    per_unit = units / units.sum(axis=1, keepdims=True)  # (K, R): run means -> unit means

    draws = shifts.mean(axis=0)  # (B,) deviations of the mean
    image_variance = float(draws.var())
    between = by_images = 0.0
    if len(share) > 1:
        between = float(_variance_of_mean(per_unit @ scores, share))
        by_images = float(_variance_of_mean(per_unit @ shifts, share).mean())
        deviation = math.sqrt(max(0.0, between - by_images))
        widen = _student(ALPHA, len(share) - 1) / Z_95
        draws = draws + widen * deviation * _run_draws(samples)
    mean = float(scores.mean())
    low, high = mean + np.quantile(draws, [0.025, 0.975])
    return Interval(
        mean=mean,
        std=float(scores.std(ddof=1)) if len(runs) > 1 else None,
        low=max(lowest, min(float(low), mean)),
        high=min(1.0, max(float(high), mean)),
        n=len(runs),
        n_test=round(fmean(len(run.image_ids) for run in runs)),
        interval=_interval_text((*runs, *minus)),
        image_variance=image_variance,
        run_variance=between - by_images,
        run_noise=by_images,
        units=len(share),
    )


def _spread(interval: Interval) -> tuple[float, float, float]:
    """The two variances of a mean, and the degrees of freedom of the second."""
    return interval.image_variance, interval.run_variance, interval.units - 1


def _half_width(alpha: float, images: float, runs: float, dof: float) -> float:
    """Half the width of a symmetric interval of level 1 - alpha, from the two variances."""
    t = _student(alpha, dof) if runs > 0 else 0.0
    return math.sqrt(_normal(alpha) ** 2 * images + t**2 * max(0.0, runs))


def _p_value(mean: float, skew: float, images: float, runs: float, dof: float) -> float:
    """The level at which the half width on the side of 0 equals the distance from 0."""
    distance = abs(mean) / skew if skew > 0 else math.inf
    if distance == 0:
        return 1.0
    if runs <= 0:
        return math.erfc(distance / math.sqrt(2 * images)) if images > 0 else 0.0
    from scipy.special import ndtri, stdtr

    low, high = 0.0, distance / math.sqrt(runs)  # bounds of t
    while high - low > 1e-9 * high:
        t = (low + high) / 2
        if ndtri(max(stdtr(dof, -t), 1e-300)) ** 2 * images + t**2 * runs < distance**2:
            low = t
        else:
            high = t
    return 2 * float(stdtr(dof, -low))


def _normal(alpha: float) -> float:
    """z of a two-sided level."""
    from scipy.special import ndtri  # takes a tenth of a second to import; only tables need it

    return -float(ndtri(max(alpha, 1e-300) / 2))


def _student(alpha: float, dof: float) -> float:
    """Student's t of a two-sided level."""
    from scipy.special import stdtrit

    return -float(stdtrit(dof, alpha / 2))


def _reason_not_tested(runs: Runs, differing: int) -> str:
    """Why a difference is not tested; empty: it is tested."""
    splits = len({run.split_seed for run in runs})
    seeds = {run.seed for run in runs} - {None}
    if 1 < splits < FEWEST_SPLITS:
        return f"{splits} splits are too few; a test needs 1, or at least {FEWEST_SPLITS}"
    if splits == 1 and 0 < len(seeds) < FEWEST_SEEDS:
        few = "1 seed is" if len(seeds) == 1 else f"{len(seeds)} seeds are"
        return f"{few} too few; a test needs at least {FEWEST_SEEDS}"
    if differing < FEWEST_IMAGES:
        return f"they differ on fewer than {FEWEST_IMAGES} test images; a test needs more images"
    return ""


def _resampled_scores(runs: Runs, samples: int) -> Array:
    """Scores of the runs under random weights of the images, common to all runs, (R, B)."""
    distinct = {run.image_ids.tobytes(): run.image_ids for run in runs}  # few: one per split
    name = hash(frozenset(distinct)), samples
    if new := [run for run in dict.fromkeys(runs) if name not in run.resampled]:
        ids = np.unique(np.concatenate([*distinct.values()]))
        ends = np.cumsum([len(run.columns) for run in new])
        matrix = np.zeros((ends[-1], len(ids)), dtype=np.float32)
        for run, end in zip(new, ends, strict=True):
            at = np.searchsorted(ids, run.image_ids)
            matrix[end - len(run.columns) : end, at] = run.columns
        # One product for all runs is ten times faster than one per run.
        sums = matrix @ _image_weights(len(ids), samples)
        for run, part in zip(new, np.split(sums, ends[:-1]), strict=True):
            run.resampled[name] = run.score(part)
    return np.stack([run.resampled[name] for run in runs]).astype(np.float64)


@functools.lru_cache(maxsize=2)  # the rows of a table share their test images and thus weights
def _image_weights(images: int, samples: int) -> Array:
    """(U, B)"""
    generator = np.random.default_rng(SEED_OF_IMAGES)
    weights = generator.standard_exponential((samples, images), dtype=np.float32)
    return np.ascontiguousarray(weights.T)


@functools.lru_cache(maxsize=2)
def _run_draws(samples: int) -> Array:
    return np.random.default_rng(SEED_OF_RUNS).standard_normal(samples)


def _units(runs: Runs) -> Array:
    """The runs of each top unit, (K, R): of a split; with one split, each run is a unit."""
    splits = dict.fromkeys(run.split_seed for run in runs)
    if len(splits) == 1:
        return np.eye(len(runs))
    return np.array([[run.split_seed == split for run in runs] for split in splits], dtype=float)


def _variance_of_mean(values: Array, share: Array) -> Array:
    """Variance of the weighted mean of K independent units, from their spread, (K, ...) -> (...).

    With equal shares this is the sample variance (K - 1 in the denominator) over K.
    """
    k = len(share)
    return np.asarray(k / (k - 1) * (share**2 @ (values - share @ values) ** 2))


def _interval_text(runs: Runs) -> str:
    seeds = {run.seed for run in runs} - {None}
    counts = {"split": len({run.split_seed for run in runs}), "seed": len(seeds)}
    over = ["images", *(f"{name}s" for name, count in counts.items() if count > 1)]
    only = [f"1 {name}" for name, count in counts.items() if count == 1]
    text = " and ".join(filter(None, [", ".join(over[:-1]), over[-1]]))
    return f"95 % bootstrap over {text}" + (f" ({', '.join(only)})" if only else "")
