"""Rows of result tables, built from finished trials.

The terms, from small to large:

- A **finished trial** (`FinishedTrial`) is a trial of the sweep with its predictions and metrics.
- A **run** is one distinct computation of a setting: a split and a seed. A method that ignores the
  seed has one run per split, however many seeds the sweep lists.
- A **row** (`Row`) is one setting of one method: the mean over its runs, with an interval. In a
  sweep with a search a row is one cell, shown at one of the points that the search tried.
- A **task** is a dataset, a paradigm and a modality. Only rows of the same task are compared.
- A **choice** (`Choice`) records why a searched cell is shown at this point: the best point by the
  search's objective if that objective ranked the points of the cell by test accuracy, else the
  default setting. Test labels never choose a point.

This module works on predictions and metrics in memory. It reads no files.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from air_core.methods import METHODS
from orchestrator.formatting import format_percent, format_value
from orchestrator.reporting._statistics import Array, Interval, Run, Runs, mean_interval, mean_score

BOUND = " (bound)"  # after the method of a bound
FEWEST_POINTS = 3  # the correlation of two points is always 1 or -1
MODALITY = "modality"  # a part of the task whose values are compared like those of settings
FIELDS = (
    *("dataset", "paradigm", "modality", "method", "settings", "metric", "n", "n_test"),
    *("mean", "std", "low", "high", "interval"),
)

Task = tuple[str, str, str]  # dataset, paradigm, modality
RunName = tuple[int | str, int | None]  # split and seed; None where the method ignores the seed


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedTrial:
    """One finished trial of a sweep: its settings, test predictions and metrics."""

    cell: str
    method: str
    flat: dict[str, Any]  # every setting by its dotted name
    settings: dict[str, Any]  # settings that the sweep varies, except `results.TABLE_COLUMNS`
    point: int
    seed: int | None  # None: it has no effect
    split_seed: int | str  # with the class seed, if runs differ in it
    metrics: dict[str, float]  # "test/accuracy_fused", "pseudo/accuracy", ...
    image_ids: Array  # (T,) test images, by their index in the dataset
    predictions: Array  # (T,)
    labels: Array  # (T,)
    # (T,) predictions by text, auxiliary and fused classifier, as far as recorded
    by_classifier: Mapping[str, Array] = field(default_factory=dict)
    unseen: Array | None = None  # (T,) bool: TRZSL, images of classes without labels
    objective: float | None = None  # of the point, mean over its runs; None without a search
    searched: frozenset[str] = frozenset()  # keys of `settings` that a search chose
    first_point: str = "default setting"  # what point 0 of the search is
    key: str = ""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)  # a value per iteration

    @functools.cached_property
    def runs(self) -> dict[str | None, Run]:
        """The run of the tested classifier, by None, and that of each recorded one, by name."""
        named = [(None, self.predictions), *self.by_classifier.items()]
        return {
            name: Run(
                split_seed=self.split_seed,
                seed=self.seed,
                image_ids=self.image_ids,
                correct=predictions == self.labels,
                unseen=self.unseen,
            )
            for name, predictions in named
        }


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
        rho = "unknown" if self.rho is None else f"{self.rho:.2f}"
        return f"{rho} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Why the row of a searched cell shows this point and no other."""

    objective: str
    default: bool  # the default setting, because the objective does not predict test accuracy
    ranking: Ranking  # how well the objective ranked the points of the cell
    points: tuple[int, ...]  # numbers of distinct points, from the best one by the objective


@dataclass(frozen=True, kw_only=True, eq=False)
class Row(Interval):
    """One setting of a method: mean accuracy over its runs with a 95 % interval.

    With a search, one cell of the sweep at the point that `choice` explains.
    """

    dataset: str
    paradigm: str
    modality: str
    method: str
    settings: dict[str, Any]
    metric: str  # accuracy; in TRZSL harmonic_mean, of seen and unseen classes
    cell: str
    point: int
    protocol: Mapping[str, Any]  # see `_protocol`
    trials: Mapping[RunName, FinishedTrial]  # one of each run
    choice: Choice | None = None  # None: the cell has a single point

    def as_json(self) -> dict[str, Any]:
        columns = {name: getattr(self, name) for name in FIELDS}
        if not self.is_tested:  # JSON has no NaN
            columns |= dict.fromkeys(("metric", "mean", "low", "high"))
        columns["protocol"] = self.protocol
        if (choice := self.choice) is None:
            return columns
        return columns | {
            "point": self.point,
            "chosen_by": "default" if choice.default else choice.objective,
            "rank_correlation": {"objective": choice.objective, **asdict(choice.ranking)},
        }

    @property
    def first(self) -> FinishedTrial:
        return next(iter(self.trials.values()))

    @functools.cached_property
    def fixed(self) -> dict[str, Any]:
        """The settings that no search chose."""
        return {key: v for key, v in self.settings.items() if key not in self.first.searched}

    @property
    def is_tested(self) -> bool:
        """Whether there are test images. If not, mean and interval are NaN."""
        return self.n_test > 0

    @property
    def task(self) -> Task:
        """Dataset, paradigm and modality. Methods are compared in the same task."""
        return self.dataset, self.paradigm, self.modality

    @property
    def is_chosen(self) -> bool:
        """Whether a search chose the settings: they are not the default ones."""
        return self.choice is not None and not self.choice.default and self.point > 0

    @property
    def departures(self) -> dict[str, Any]:
        """Settings that define the method and have another value; without those that vary."""
        return {
            key: self.first.flat[key]
            for key, value in METHODS[self.method].sets.items()
            if key not in self.settings and self.first.flat.get(key, value) != value
        }

    def value(self, key: str) -> Any:
        """The value of a setting that the sweep varies, or the modality; None without it."""
        return self.modality if key == MODALITY else self.settings.get(key)

    def runs(self, classifier: str | None = None) -> Runs:
        """The runs; of a classifier (text, auxiliary, fused), those that recorded it."""
        return _runs(self.trials, classifier)

    @functools.cached_property
    def collapsed_runs(self) -> list[Collapse]:
        """Runs that are far below the others."""
        return collapsed_runs(self.runs()) if self.is_tested else []

    def average(self, metric: str) -> float | None:
        """Mean of a metric over the runs that have it; None if no run has it."""
        values = [trial.metrics.get(metric, math.nan) for trial in self.trials.values()]
        values = [value for value in values if not math.isnan(value)]
        return sum(values) / len(values) if values else None

    def curve(self, metric: str) -> Array | None:
        """A metric by run and iteration, (R, I); None if the runs have no such curve."""
        curves = [trial.curves.get(metric, ()) for trial in self.trials.values()]
        lengths = {len(curve) for curve in curves}
        return np.array(curves, dtype=float) if len(lengths) == 1 and lengths != {0} else None


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """A run far below the other runs of its setting."""

    split_seed: int | str
    seed: int | None
    score: float
    others: float  # median of the other runs


def collapsed_runs(runs: Runs) -> list[Collapse]:
    """Runs that collapsed: training diverged, or the prompt predicts a single class.

    A collapsed run is below the median of the other runs by more than 10 points or a quarter of
    that median, whichever is less; by more than 5 of their robust standard deviations (1.48 times
    the median distance from the median); and by more than 4 standard errors of an accuracy on its
    test images. With fewer than three runs, or if half of them are low, none counts as collapsed.
    """
    scores = [run.plain for run in runs]
    result = []
    for i, (run, score) in enumerate(zip(runs, scores, strict=True)):
        others = scores[:i] + scores[i + 1 :]
        if len(others) < 2:
            break
        middle = median(others)
        spread = 1.4826 * median(abs(other - middle) for other in others)
        noise = math.sqrt(middle * (1 - middle) / len(run.image_ids))
        if middle - score > max(min(0.10, middle / 4), 5 * spread, 4 * noise):
            result.append(
                Collapse(split_seed=run.split_seed, seed=run.seed, score=score, others=middle)
            )
    return result


# ---------------------------------------------------------------- from trials to rows


def row_of(point: Sequence[FinishedTrial]) -> Row:
    """The row of the trials of one setting."""
    first, trials = point[0], _distinct(point)
    nan = math.nan
    untested = Interval(n=len(trials), n_test=0, mean=nan, std=None, low=nan, high=nan, interval="")
    return Row(
        **vars(mean_interval(_runs(trials)) if len(first.image_ids) else untested),
        dataset=dataset_text(first.flat),
        paradigm=str(first.flat["paradigm"]),
        modality=str(first.flat["modality"]),
        method=first.method,
        settings=dict(first.settings),
        metric="accuracy" if first.unseen is None else "harmonic_mean",
        cell=first.cell,
        point=first.point,
        protocol=_protocol(point, trials),
        trials=trials,
    )


def chosen_point(points: Sequence[list[FinishedTrial]], objective: str) -> tuple[int, Choice]:
    """The number of the point at which the table shows a searched cell, and why."""
    distinct: dict[str, list[FinishedTrial]] = {}
    for point in points:
        distinct.setdefault(repr(sorted(point[0].settings.items())), point)
    # The first of equal ones stays first.
    ranked = sorted(distinct.values(), key=_objective, reverse=True)
    scores = [
        (_objective(point), mean_score(_runs(_distinct(point))))
        for point in distinct.values()
        if len(point[0].image_ids) and _objective(point) > -math.inf
    ]
    found = ranking(*np.array(scores, dtype=float).reshape(-1, 2).T)
    first = points[0][0].point  # not 0 if the default point failed
    set_aside = first == 0 and not found.predicts_accuracy
    numbers = tuple(point[0].point for point in ranked if _objective(point) > -math.inf)
    choice = Choice(objective=objective, default=set_aside, ranking=found, points=numbers)
    return (0 if set_aside else ranked[0][0].point), choice


def ranking(objectives: Array, accuracies: Array, *, samples: int = 2000) -> Ranking:
    """How well objectives (P,) rank points by their test accuracies (P,): Spearman's correlation.

    The interval is a bootstrap for other points of the same search space. It is slightly too narrow
    for few points: of cells with 4 to 12 points and a random objective, 3 to 7 % pass as predicted
    instead of 2.5 %.
    """
    count = len(objectives)
    unknown = Ranking(rho=None, low=-1.0, high=1.0, points=count)
    if count < FEWEST_POINTS or len({*objectives}) == 1 or len({*accuracies}) == 1:
        return unknown
    index = np.random.default_rng(0).integers(0, count, (samples, count))
    rho = float(_correlations(objectives[None], accuracies[None])[0])
    drawn = _correlations(objectives[index], accuracies[index])
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    return Ranking(rho=rho, low=min(low, rho), high=max(high, rho), points=count)


def _correlations(objectives: Array, accuracies: Array) -> Array:
    """Spearman's correlation of each of B samples, (B, P) each -> (B,)."""
    import pandas as pd  # takes a quarter of a second; only searches need it

    x, y = (pd.DataFrame(each).rank(axis=1).to_numpy() for each in (objectives, accuracies))
    x, y = (each - each.mean(axis=1, keepdims=True) for each in (x, y))
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    # A sample of equal points has no ranking; its correlation counts as 0.
    cross = (x * y).sum(axis=1)
    return np.asarray(np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0))


def _objective(point: Sequence[FinishedTrial]) -> float:
    """The objective of a point; -inf without one."""
    objective = point[0].objective
    return -math.inf if objective is None or math.isnan(objective) else objective


def _distinct(point: Sequence[FinishedTrial]) -> dict[RunName, FinishedTrial]:
    """One trial per run, by split and seed; the seed is None where the method ignores it."""
    distinct: dict[RunName, FinishedTrial] = {}
    for trial in point:
        distinct.setdefault((trial.split_seed, trial.seed), trial)
    return distinct


def _runs(trials: Mapping[RunName, FinishedTrial], classifier: str | None = None) -> Runs:
    found = (trial.runs.get(classifier) for trial in trials.values())
    return tuple(run for run in found if run is not None)


def _protocol(
    point: Sequence[FinishedTrial], trials: Mapping[RunName, FinishedTrial]
) -> dict[str, Any]:
    """Conditions that must be equal before numbers of different tables can be compared."""
    flat = point[0].flat
    is_trzsl = flat["paradigm"] == "trzsl"
    classes = {trial.flat.get("class_seed", 500) for trial in point} if is_trzsl else set()
    seeds = Counter(split for split, seed in trials if seed is not None)
    whole = {"pool_size": None, "pool_ratio": 1.0, "pool_missing": 0.0}
    return {
        "backbone": str(flat.get("backbone", "")),
        "splits": len({trial.split_seed for trial in point}),
        # The largest number in a split; 0: the method ignores the seed.
        "seeds": max(seeds.values(), default=0),
        "shots": flat.get("shots", 2) if flat["paradigm"] == "ssl" else None,
        # None if runs differ in it.
        "class_seed": next(iter(classes)) if len(classes) == 1 else None,
        "leaky_pool": bool(flat.get("leaky_pool", False)),
        # The sweep neither shrinks nor unbalances the pool.
        "whole_pool": all(flat.get(key, value) == value for key, value in whole.items()),
    }


# ---------------------------------------------------------------- text


def is_bound(method: str) -> bool:
    """Whether a row bounds what images could gain, and is no method."""
    return METHODS[method].is_bound


def dataset_text(flat: Mapping[str, Any]) -> str:
    """The dataset of a row; `a -> b` for a prompt that is learned on a and tested on b."""
    names = (flat["dataset"], flat.get("test_dataset"))
    return " -> ".join(dict.fromkeys(str(name) for name in names if name is not None))


def method_text(method: str) -> str:
    """
    >>> method_text("air"), method_text("air_ceiling")
    ('air', 'air_ceiling (bound)')
    """
    return method + BOUND * is_bound(method)


def settings_text(row: Row, keys: Iterable[str]) -> str:
    return ", ".join(
        f"{key} {format_value(row.settings[key])}" for key in keys if key in row.settings
    )


def row_text(row: Row, keys: Iterable[str] | None = None) -> str:
    """The method of a row, followed by its settings.

    Args:
        keys: of the settings. Default: all.
    """
    text = settings_text(row, row.settings if keys is None else keys)
    return ", ".join(filter(None, [method_text(row.method), text]))


def task_text(task: Task) -> str:
    """
    >>> task_text(("digits", "ul", "text"))
    'digits, ul/text'
    """
    dataset, paradigm, modality = task
    return f"{dataset}, {paradigm}/{modality}"


def metric_text(rows: Sequence[Row]) -> str:
    """The metric of the rows with its unit, for an axis: `accuracy, %`."""
    return f"{' or '.join(dict.fromkeys(row.metric for row in rows)).replace('_', ' ')}, %"


def tasks_of(rows: Iterable[Row]) -> list[Task]:
    return list(dict.fromkeys(row.task for row in rows))


def mean_std(row: Row) -> str:
    if not row.is_tested:
        return ""
    return format_percent(row.mean) + ("" if row.std is None else f" ± {format_percent(row.std)}")


def signed_percent(value: float) -> str:
    """
    >>> signed_percent(0.021), signed_percent(-0.00001)
    ('+2.1', '+0.0')
    """
    return f"{round(100 * value, 1) + 0.0:+.1f}"
