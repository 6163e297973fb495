"""Rows of result tables and comparisons between them, built from finished trials.

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
- A **baseline** of a row is a row of the method's host or of its control (see
  `orchestrator.spec.presets`), in the same task and with the same shared settings.
- A **comparison** (`Comparison`) is a row minus one of its baselines, or minus the row of the same
  method with another value of a setting, paired by image and run.
- The **best classifier** (`Candidate`) of a task is that of all classifiers of its rows which every
  screen marks with `*` and `airsweep export best` exports. Test labels do not select it.

This module works on predictions and metrics in memory. It reads no files.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np

from air_core.bundle.checks import CLASSIFIERS
from air_core.methods import METHODS, PREFERENCE
from air_core.specs.flat import trial_keys
from orchestrator.formatting import format_percent, format_value, plural
from orchestrator.reporting._ranking import Ranking, ranking
from orchestrator.reporting._statistics import (
    ALPHA,
    Z_95,
    Array,
    Collapse,
    Difference,
    Interval,
    Run,
    Runs,
    Verdict,
    collapsed_runs,
    corrected_p_values,
    detectable_differences,
    mean_interval,
    mean_score,
    paired_difference,
    verdict,
)
from orchestrator.spec import presets
from orchestrator.spec.sweep import SMOKE_ONLY, computation_of

EMPTY = "no finished trial yet"
BEST = "* "  # before the number of the best classifier
BOUND = " (bound)"  # after the method of a bound
MAX_NAMES = 5  # of methods in a sentence
AT_CHANCE = "Not better than chance"
UNTESTED = "No image is labelled for test, so no accuracy is known."
MUTUAL_INFORMATION = "objective/mutual_information"  # of the text classifier on the pool

Task = tuple[str, str, str]  # dataset, paradigm, modality
RunName = tuple[int | str, int | None]  # split and seed; see FinishedTrial


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedTrial:
    """One finished trial of a sweep: its settings, test predictions and metrics."""

    cell: str
    method: str
    flat: dict[str, Any]  # every setting by its dotted name
    settings: dict[str, Any]  # settings that the sweep varies, except `results.TABLE_COLUMNS`
    point: int
    seed: int
    split_seed: int | str  # with the class seed, if runs differ in it
    objective: float | None  # of the point, mean over its runs; None without a search
    metrics: dict[str, float]  # "test/accuracy_fused", "pseudo/accuracy", ...
    image_ids: Array  # (T,) test images, by their index in the dataset
    predictions: Array  # (T,)
    labels: Array  # (T,)
    # (T,) predictions by text, auxiliary and fused classifier, as far as recorded
    by_classifier: Mapping[str, Array] = field(default_factory=dict)
    unseen: Array | None = None  # (T,) bool: TRZSL, images of classes without labels
    searched: frozenset[str] = frozenset()  # keys of `settings` that a search chose
    first_point: str = "default setting"  # what point 0 of the search is
    key: str = ""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)  # a value per iteration

    @functools.cached_property
    def ignores_seed(self) -> bool:
        """Whether trials that differ in the seed alone are the same computation."""
        settings = {key: value for key, value in self.flat.items() if key in trial_keys()}
        return computation_of(settings | {"seed": 0}) == computation_of(settings | {"seed": 1})

    def predicted(self, classifier: str | None) -> Array | None:
        """Predictions (T,) of a classifier; None: not recorded. Without a name: the tested ones."""
        return self.predictions if classifier is None else self.by_classifier.get(classifier)


@dataclass(frozen=True, kw_only=True)
class Row(Interval):
    """One setting of a method: mean accuracy over its runs with a 95 % interval.

    With a search, one cell of the sweep at the point that `choice` explains.
    """

    dataset: str
    paradigm: str
    modality: str
    method: str
    settings: dict[str, Any]
    metric: str = "accuracy"  # harmonic_mean (of seen and unseen classes) in TRZSL
    # `cell` and `point` identify the row's trials.
    cell: str
    point: int
    protocol: Protocol
    choice: Choice | None = None  # None: the cell has a single point
    # Settings of the method's definition that the sweep changed, where `settings` lacks them.
    departures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        choice = {} if self.choice is None else self.choice.as_json(self.point)
        columns = {name: getattr(self, name) for name in FIELDS}
        if not self.is_tested:  # JSON has no NaN
            columns |= dict.fromkeys(("metric", "mean", "low", "high"))
        return columns | {"protocol": asdict(self.protocol)} | choice

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

    def value(self, key: str) -> Any:
        """The value of a setting that the sweep varies, or the modality; None without it."""
        return self.modality if key == MODALITY else self.settings.get(key)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Conditions that must be equal before numbers of different tables can be compared."""

    backbone: str
    splits: int
    seeds: int  # largest number in a split; 0: the method ignores the seed
    shots: int | None  # ssl
    class_seed: int | None  # trzsl; None if runs differ in it
    leaky_pool: bool
    whole_pool: bool  # the sweep neither shrinks nor unbalances the pool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Why the row of a searched cell shows this point and no other."""

    objective: str
    default: bool  # the default setting, because the objective does not predict test accuracy
    ranking: Ranking  # how well the objective ranked the points of the cell
    points: tuple[int, ...]  # numbers of distinct points, from the best one by the objective

    def as_json(self, point: int) -> dict[str, Any]:
        return {
            "point": point,
            "chosen_by": "default" if self.default else self.objective,
            "rank_correlation": {"objective": self.objective, **asdict(self.ranking)},
        }


MARKS = {"host": "†", "control": "‡"}  # by role
MODALITY = "modality"  # a part of the task whose values are compared like those of settings
WORSE = "↓"

FIELDS = (
    *("dataset", "paradigm", "modality", "method", "settings", "metric", "n", "n_test"),
    *("mean", "std", "low", "high", "interval"),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row minus a baseline: the difference, its interval and its significance."""

    row: Row
    baseline: Row
    # Of the baseline: host or control; default, of a search; else the key in whose value it differs
    role: str
    difference: Difference  # paired by image and run
    p_corrected: float  # over the comparisons of its question, see `compared`
    detectable: float  # the smallest difference that the test detects with 80 % power

    @property
    def methods(self) -> tuple[str, str]:
        return self.row.method, self.baseline.method

    @property
    def name(self) -> str:
        """What is compared, such as `air - cpl` or `cpl with prompt.length 8 vs 2`."""
        if self.role in MARKS:
            return " - ".join(self.methods)
        return f"{self.row.method} with {self.role} {' vs '.join(self.values)}"

    @property
    def values(self) -> list[str]:
        """The values of the setting in which row and baseline differ."""
        return [format_value(row.value(self.role)) for row in (self.row, self.baseline)]

    @property
    def verdict(self) -> Verdict:
        return verdict(self.difference, self.p_corrected)

    @property
    def is_significant(self) -> bool:
        return self.verdict in ("higher", "lower")

    @property
    def is_tested(self) -> bool:
        return self.verdict != "not tested"

    @property
    def significance(self) -> str:
        """significant, not significant or not tested"""
        return "significant" if self.is_significant else self.verdict

    @property
    def text(self) -> str:
        """The difference in points; with its interval, such as `+2.1 [+0.3, +4.0]`, if tested."""
        if not self.is_tested:
            return signed_percent(self.difference.mean)
        return signed_interval(self.difference)

    @property
    def mark(self) -> str:
        """† for the host, ‡ for the control, with ↓ if the row is worse; empty: not significant."""
        if not self.is_significant:
            return ""
        return MARKS.get(self.role, "") + (WORSE if self.verdict == "lower" else "")

    @property
    def ascii_mark(self) -> str:
        """The mark for CSV: `host+` better than the host, `host-` worse; empty: not significant."""
        return {"higher": f"{self.role}+", "lower": f"{self.role}-"}.get(self.verdict, "")

    def as_json(self) -> dict[str, Any]:
        difference = self.difference
        return {
            "role": self.role,
            "method": self.baseline.method,
            "settings": self.baseline.settings,
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "n": difference.n,
            "interval": difference.interval,
            "p": difference.p,
            "p_corrected": self.p_corrected,
            "marked": self.is_significant,
            "untold": difference.reason_not_tested,
            "detectable": None if difference.reason_not_tested else self.detectable,
        }


VALIDATION, EXPERIMENTS, TEST = "validation_accuracy", "experiments", "test_accuracy"
SCORES = {VALIDATION: "objective/validation_accuracy", TEST: "test/accuracy"}  # metrics
MEASURES = {
    VALIDATION: "the highest on validation images",
    EXPERIMENTS: (
        "first in the order of docs/experiments.md, without validation images to choose by"
    ),
    TEST: "the highest on test images",
}


@dataclass(frozen=True)
class Candidate:
    """The classifier of some rows with the highest score."""

    row: Row
    classifier: str  # text, auxiliary or fused
    by: str  # of `MEASURES`
    score: float | None  # mean over the runs of the row; None: by the order of methods
    test: Interval | None  # of this classifier over the row's runs; None: no test images
    trial: FinishedTrial  # the run with the highest score
    candidates: int  # classifiers that were compared
    tied: Sequence[str] = ()  # those with the same score
    images: float | None = None  # for validation; None: another measure, or unknown

    def __str__(self) -> str:
        text = f"{self.classifier} classifier of {row_text(self.row, [*self.row.settings])}"
        if self.test is not None:
            metric = self.row.metric.replace("_", " ")
            text += f", test {metric} {format_percent(self.test.mean)} %"
        if self.candidates == 1:
            return f"{text} (the only one)"
        if self.score is None:
            return f"{text}: {MEASURES[self.by]}"
        number = plural(self.candidates, "classifier")
        text += f": of {number} {MEASURES[self.by]}, {format_percent(self.score)} %"
        text += f" of {self.images:,.0f}" if self.images else ""
        others = self.tied[0] if len(self.tied) == 1 else f"{len(self.tied)} others"
        return f"{text}, tied with {others}" if self.tied else text

    def as_json(self) -> dict[str, Any]:
        """The row with mean, deviation and interval of this classifier."""
        row = self.row if self.test is None else replace(self.row, **vars(self.test))
        return row.as_json() | {"classifier": self.classifier}


# ---------------------------------------------------------------- rows


def rows(trials: Sequence[FinishedTrial], search_objective: str | None) -> list[Row]:
    """Group trials into rows: one per setting or, with a search, one per cell.

    Rows stand in the order in which their settings first appear.

    Args:
        search_objective: the objective of the search; None: one row per setting.
    """
    points: dict[tuple[str, int], list[FinishedTrial]] = {}
    for trial in trials:
        points.setdefault((trial.cell, trial.point), []).append(trial)
    if search_objective is None:
        return [_row(point) for point in points.values()]
    cells: dict[str, list[list[FinishedTrial]]] = {}
    for (cell, _), point in points.items():
        cells.setdefault(cell, []).append(point)
    return [_searched_row(group, search_objective) for group in cells.values()]


def _searched_row(points: Sequence[list[FinishedTrial]], objective: str) -> Row:
    """The row of a searched cell, at its best point by the objective or at its default point."""
    if len(points) == 1:
        return _row(points[0])
    distinct: dict[str, list[FinishedTrial]] = {}
    for point in points:
        distinct.setdefault(repr(sorted(point[0].settings.items())), point)
    found = ranking(*_scores(distinct.values()))
    # The first of equal ones stays first.
    by_objective = sorted(distinct.values(), key=_objective, reverse=True)
    first = points[0]
    set_aside = first[0].point == 0 and not found.predicts_accuracy  # else the default point failed
    choice = Choice(
        objective=objective,
        default=set_aside,
        ranking=found,
        points=tuple(p[0].point for p in by_objective if _objective(p) > -math.inf),
    )
    return _row(first if set_aside else by_objective[0], choice)


def _scores(points: Iterable[Sequence[FinishedTrial]]) -> tuple[Array, Array]:
    """Objective and test accuracy of the points that have both, (P,) each."""
    scores = [
        (_objective(point), mean_score(_runs(_distinct(point))))
        for point in points
        if len(point[0].image_ids) and _objective(point) > -math.inf
    ]
    objectives, accuracies = np.array(scores, dtype=float).reshape(-1, 2).T
    return objectives, accuracies


def _objective(point: Sequence[FinishedTrial]) -> float:
    """The objective of a point; -inf without one."""
    objective = point[0].objective
    return -math.inf if objective is None or math.isnan(objective) else objective


def _row(point: Sequence[FinishedTrial], choice: Choice | None = None) -> Row:
    first, runs = point[0], _runs(_distinct(point))
    return Row(
        **vars(mean_interval(runs) if len(first.image_ids) else _untested(len(runs))),
        dataset=dataset_text(first.flat),
        paradigm=str(first.flat["paradigm"]),
        modality=str(first.flat["modality"]),
        method=first.method,
        settings=dict(first.settings),
        metric="accuracy" if first.unseen is None else "harmonic_mean",
        cell=first.cell,
        point=first.point,
        protocol=_protocol(point),
        choice=choice,
        departures=_departures(first),
    )


def _untested(runs: int) -> Interval:
    nan = math.nan
    return Interval(n=runs, n_test=0, mean=nan, std=None, low=nan, high=nan, interval="")


def _departures(trial: FinishedTrial) -> dict[str, Any]:
    """Settings that define the method and have another value; without those that vary."""
    return {
        key: trial.flat[key]
        for key, value in METHODS[trial.method].sets.items()
        if key not in trial.settings and trial.flat.get(key, value) != value
    }


def _protocol(point: Sequence[FinishedTrial]) -> Protocol:
    flat = point[0].flat
    is_trzsl = flat["paradigm"] == "trzsl"
    classes = {trial.flat.get("class_seed", 500) for trial in point} if is_trzsl else set()
    seeds = Counter(split for split, seed in _distinct(point) if seed is not None)
    whole = {"pool_size": None, "pool_ratio": 1.0, "pool_missing": 0.0}
    return Protocol(
        backbone=str(flat.get("backbone", "")),
        splits=len({trial.split_seed for trial in point}),
        seeds=max(seeds.values(), default=0),
        shots=flat.get("shots", 2) if flat["paradigm"] == "ssl" else None,
        class_seed=next(iter(classes)) if len(classes) == 1 else None,
        leaky_pool=bool(flat.get("leaky_pool", False)),
        whole_pool=all(flat.get(key, value) == value for key, value in whole.items()),
    )


def dataset_text(flat: Mapping[str, Any]) -> str:
    """The dataset of a row; `a -> b` for a prompt that is learned on a and tested on b."""
    names = (flat["dataset"], flat.get("test_dataset"))
    return " -> ".join(dict.fromkeys(str(name) for name in names if name is not None))


def _runs(
    distinct: Mapping[RunName, FinishedTrial],
    classifier: str | None = None,
) -> Runs:
    return tuple(
        Run(
            split_seed=split_seed,
            seed=seed,
            image_ids=trial.image_ids,
            correct=predictions == trial.labels,
            unseen=trial.unseen,
        )
        for (split_seed, seed), trial in distinct.items()
        if (predictions := trial.predicted(classifier)) is not None
    )


def _distinct(point: Sequence[FinishedTrial]) -> dict[RunName, FinishedTrial]:
    """One trial per run, by split and seed; the seed is None where the method ignores it."""
    distinct: dict[RunName, FinishedTrial] = {}
    for trial in point:
        seed = None if point[0].ignores_seed else trial.seed
        distinct.setdefault((trial.split_seed, seed), trial)
    return distinct


# ---------------------------------------------------------------- comparisons


def baseline_methods(method: str) -> list[tuple[str, str]]:
    """The methods that presets compare a method with: its host and its control."""
    preset = METHODS[method]
    pairs = (("host", preset.host), ("control", preset.control))
    return [(role, name) for role, name in pairs if name is not None]


def uses_diffusion(method: str) -> bool:
    """Whether a method uses a diffusion model: synthetic images or denoising errors."""
    if is_bound(method):
        return False
    pins = METHODS[method].pins
    has_images = "images_per_class" not in pins and pins.get("images_from") == "generator"
    return has_images or "evidence.draws" not in pins


def compared(pairs: Sequence[tuple[Row, Row, str, Difference]]) -> list[Comparison]:
    """Comparisons from rows, baselines, roles and differences.

    p values are corrected within a question: what methods gain over their hosts, over their
    controls, or with other values of a setting, in one task. The runs of all given comparisons of a
    task give the common runs part.
    """
    tasks: dict[Task, list[int]] = {}
    for position, (_, baseline, *_) in enumerate(pairs):
        tasks.setdefault(baseline.task, []).append(position)
    tests: dict[int, tuple[float, float]] = {}  # corrected p value and detectable difference
    for positions in tasks.values():
        differences = [pairs[position][3] for position in positions]
        roles = [pairs[position][2] for position in positions]
        p_values = corrected_p_values(differences, roles)
        detectable = detectable_differences(differences, roles)
        tests |= zip(positions, zip(p_values, detectable, strict=True), strict=True)
    return [
        Comparison(
            row=row,
            baseline=baseline,
            role=role,
            difference=difference,
            p_corrected=tests[position][0],
            detectable=tests[position][1],
        )
        for position, (row, baseline, role, difference) in enumerate(pairs)
    ]


def is_bound(method: str) -> bool:
    """Whether a row bounds what images could gain, and is no method."""
    return METHODS[method].is_bound


# ---------------------------------------------------------------- the best classifier


def best_candidate(
    results: Results, rows: Sequence[Row], by: str | None = None, classifier: str | None = None
) -> Candidate:
    """The best of the classifiers of rows.

    A trial has up to three classifiers, and each classifier of a row is a candidate. Its score is
    the mean accuracy of the row's runs on validation images. Without validation images, and of
    equal ones, the order of methods in docs/experiments.md selects, then that of the rows: scores
    without labels choose worse.

    Args:
        by: of `MEASURES`. Default: validation_accuracy; experiments without validation images.
        classifier: text, auxiliary or fused, as the only candidate of each row.

    Raises:
        ValueError: `by` is not a measure, there is no candidate, or some lack the measure.
    """
    if by is not None and by not in MEASURES:
        raise ValueError(f"unknown --by {by!r}; allowed: {', '.join(MEASURES)}")
    names = CLASSIFIERS if classifier is None else (classifier,)
    of_rows = [[*results.distinct_trials(row).values()] for row in rows]
    runs = {
        (i, name): trials
        for i, trials in enumerate(of_rows)
        for name in names
        if all(name in trial.by_classifier for trial in trials)
    }
    if not runs:
        raise ValueError(f"no finished row has a {classifier or 'recorded'} classifier")
    metric = SCORES.get(by or VALIDATION, "")
    scores = {
        (i, name): [_value(trial, metric, name) for trial in trials]
        for (i, name), trials in runs.items()
    }
    # The fused classifier of the first method in the order, where it has one.
    ranked = sorted(runs, key=lambda of: (_rank(rows[of[0]].method), -CLASSIFIERS.index(of[1])))
    score: float | None = None
    tied: list[str] = []
    if not any(map(math.isnan, chain(*scores.values()))):
        by = by or VALIDATION
        means = {of: round(fmean(scores[of]), 9) for of in ranked}  # equal ones in every digit
        best = max(means, key=lambda of: means[of])  # the first of equal ones
        of_runs, score = scores[best], means[best]
        same = (of for of in means if means[of] == score and of != best)
        tied = [f"{of[1]} of {row_text(rows[of[0]], [*rows[of[0]].settings])}" for of in same]
    elif by in (None, EXPERIMENTS):
        by, best = EXPERIMENTS, ranked[0]
        of_runs = [_value(trial, MUTUAL_INFORMATION, best[1]) for trial in runs[best]]
    else:
        raise ValueError(
            f"some classifiers have no {by}: there are no images for it; give another --by: "
            f"{', '.join(name for name in MEASURES if name != by)}"
        )
    row, name = rows[best[0]], best[1]
    trial = runs[best][of_runs.index(max(of_runs))]
    test: Interval | None = None
    mean = results.mean(row, f"{SCORES[TEST]}_{name}") if row.is_tested else None
    if mean is not None:  # the table's number
        test = replace(mean_interval(results.runs(row, name)), mean=mean)
    images = results.mean(row, "validation/images") if by == VALIDATION else None
    return Candidate(row, name, by, score, test, trial, len(runs), tied, images)


def _rank(method: str) -> int:
    return PREFERENCE.index(method) if method in PREFERENCE else len(PREFERENCE)


def _value(trial: FinishedTrial, metric: str, classifier: str) -> float:
    """A metric of a classifier; NaN without it."""
    return trial.metrics.get(f"{metric}_{classifier}", math.nan)


class Results:
    """The rows of a sweep's table, the trials behind each row and the comparisons between rows.

    Args:
        rows: the rows of the table, from `rows`.
        trials: all finished trials of the sweep. With a search this includes trials of points that
            no row shows.
        classes: number of classes of the test images, by the dataset of a row.
        is_smoke: whether the sweep is a smoke run, whose numbers mean nothing.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        trials: Sequence[FinishedTrial],
        classes: Mapping[str, int] = MappingProxyType({}),
        is_smoke: bool = False,
    ) -> None:
        self.rows, self.trials, self.classes = rows, trials, classes
        self.is_smoke = is_smoke
        self._points: dict[tuple[str, int], list[FinishedTrial]] = {}
        # By cell. `baseline` does not match these settings: each method is compared at its own best
        # point.
        self._searched: dict[str, set[str]] = {}
        for trial in trials:
            self._points.setdefault((trial.cell, trial.point), []).append(trial)
            self._searched.setdefault(trial.cell, set()).update(trial.searched)
        self._of_method: dict[tuple[str, ...], list[Row]] = {}  # in a dataset and paradigm
        for row in rows:
            self._of_method.setdefault((row.method, *row.task[:2]), []).append(row)
        self._distinct: dict[tuple[str, int], dict[RunName, FinishedTrial]] = {}
        self._point_rows: dict[tuple[str, int], Row] = {}

    @functools.cached_property
    def tasks(self) -> list[Task]:
        return tasks_of(self.rows)

    @functools.cached_property
    def varied_settings(self) -> list[str]:
        """Settings that were searched or have several values, in order of appearance."""
        seen: dict[str, set[str]] = {}
        every = (*(row.settings for row in self.rows), *(t.settings for t in self.trials))
        for settings in every:
            for key, value in settings.items():
                seen.setdefault(key, set()).add(repr(value))
        searched = self._searched_keys
        return [key for key, values in seen.items() if key in searched or len(values) > 1]

    @functools.cached_property
    def _searched_keys(self) -> set[str]:
        return set().union(*self._searched.values())

    @functools.cached_property
    def comparisons(self) -> list[Comparison]:
        """Each row minus the rows of its method's host and control, where the sweep has them.

        p values are corrected within a question, see `compared`.
        """
        return self._compared(
            (row, self.baseline(row, method), role)
            for row in self.rows
            for role, method in baseline_methods(row.method)
        )

    @functools.cached_property
    def value_comparisons(self) -> dict[str, list[Comparison]]:
        """By setting of the grid, and for the modality, each row minus the row with the default
        value, or else with the first one, where method, task and all other settings are equal.
        """
        keys = [*(key for key in self.varied_settings if key not in self._searched_keys), MODALITY]
        found = {
            key: self._compared((row, self._at_default(row, key), key) for row in self.rows)
            for key in keys
        }
        return {key: comparisons for key, comparisons in found.items() if comparisons}

    @property
    def all_comparisons(self) -> list[Comparison]:
        """The comparisons with hosts and controls, then those of values."""
        return [*self.comparisons, *chain.from_iterable(self.value_comparisons.values())]

    @functools.cached_property
    def search_gains(self) -> dict[str, Comparison]:
        """By searched cell, its best point by the objective minus the default point."""
        best = [points[0] for row in self.rows if (points := self.best_points(row))]
        pairs = ((row, self._point(row.cell, 0), "default") for row in best if row.point)
        return {c.row.cell: c for c in self._compared(pairs)}

    def best_points(self, row: Row, most: int = 3) -> list[Row]:
        """The best points of a searched cell by its objective, and the default point.

        Empty without a search, or if the cell has a single point.
        """
        if row.choice is None:
            return []
        found = (self._point(row.cell, n) for n in dict.fromkeys([*row.choice.points[:most], 0]))
        return [point for point in found if point is not None]

    def _point(self, cell: str, number: int) -> Row | None:
        """The row of a point, kept since its interval is a bootstrap."""
        name = cell, number
        if name in self._points and name not in self._point_rows:
            self._point_rows[name] = _row(self._points[name])
        return self._point_rows.get(name)

    def searched(self, row: Row) -> set[str]:
        """The settings of a row that a search chose."""
        return self._searched.get(row.cell, set())

    def first_point(self, row: Row) -> str:
        """What point 0 of the row's cell is, in words."""
        return self._points[row.cell, row.point][0].first_point

    def objective(self, row: Row) -> float | None:
        """The objective of the row's point, mean over its runs; None without a search."""
        return self._points[row.cell, row.point][0].objective

    def _compared(self, pairs: Iterable[tuple[Row, Row | None, str]]) -> list[Comparison]:
        """Comparisons of rows, baselines and roles, except pairs without a common run."""
        found = []
        for row, baseline, role in pairs:
            difference = self.difference(row, baseline) if baseline else None
            if baseline is not None and difference is not None:
                found.append((row, baseline, role, difference))
        return compared(found)

    def chance(self, row: Row) -> float | None:
        """Accuracy of guessing, 1 over the number of classes; None if that is unknown."""
        classes = self.classes.get(row.dataset)
        return 1 / classes if classes else None

    def is_at_chance(self, row: Row, interval: Interval | None = None) -> bool:
        """Whether a row's accuracy is not above that of guessing, by its interval.

        Args:
            interval: of one of its classifiers. Default: that of the row.
        """
        chance = self.chance(row)
        return chance is not None and row.metric == "accuracy" and (interval or row).low <= chance

    def comparisons_of(self, row: Row) -> dict[str, Comparison]:
        """The comparisons of a row, by the role of the baseline."""
        return {c.role: c for c in self.comparisons if c.row is row}

    @functools.cached_property
    def best_classifiers(self) -> dict[Task, Candidate]:
        """The best classifier of each task, see `best_candidate`. A task of bounds has none."""
        best: dict[Task, Candidate] = {}
        for task in self.tasks:
            rows = [row for row in self.rows if row.task == task and not is_bound(row.method)]
            with suppress(ValueError):  # no candidate
                best[task] = best_candidate(self, rows)
        return best

    def best_classifier(self, task: Task) -> Candidate | None:
        """The best classifier of a task: that of `airsweep export best`."""
        return self.best_classifiers.get(task)

    def best_of(self, row: Row) -> Candidate | None:
        """The best classifier of a row's task, if it is one of this row."""
        best = self.best_classifier(row.task)
        return best if best is not None and best.row is row else None

    @property
    def tested(self) -> list[Row]:
        """The rows with test images."""
        return [row for row in self.rows if row.is_tested]

    def distinct_trials(self, row: Row) -> dict[RunName, FinishedTrial]:
        """One trial per run of a row, by split and seed; the seed is None where it is ignored."""
        point = (row.cell, row.point)
        if point not in self._distinct:
            self._distinct[point] = _distinct(self._points[point])
        return self._distinct[point]

    def runs(self, row: Row, classifier: str | None = None) -> Runs:
        """The runs of a row; of a classifier (text, auxiliary, fused), those that recorded it."""
        return _runs(self.distinct_trials(row), classifier)

    def mean(self, row: Row, metric: str) -> float | None:
        """Mean of a metric over the runs of a row; None if no run has it."""
        values = self.values(row, metric)
        return sum(values) / len(values) if values else None

    def values(self, row: Row, metric: str) -> list[float]:
        """The values of a metric over the runs of a row that have it."""
        values = [
            trial.metrics.get(metric, math.nan) for trial in self.distinct_trials(row).values()
        ]
        return [value for value in values if not math.isnan(value)]

    def curve(self, row: Row, metric: str) -> Array | None:
        """A metric by run and iteration, (R, I); None if the runs have no such curve."""
        curves = [trial.curves.get(metric, ()) for trial in self.distinct_trials(row).values()]
        lengths = {len(curve) for curve in curves}
        if len(lengths) != 1 or lengths == {0}:
            return None
        return np.array(curves, dtype=float)

    def baseline(self, row: Row, method: str) -> Row | None:
        """The row of another method in the same task to compare a row with.

        It has equal values for all settings that both rows have, searched settings excepted. Of
        several such rows the one that shares the most settings is taken.
        """
        others = self._of_method.get((method, *row.task[:2]), [])
        others = [other for other in others if other.task == row.task and other is not row]
        return _closest(self._equal_rows(row, others))

    def _at_default(self, row: Row, key: str) -> Row | None:
        """The row with the default value of a setting, or else with the first one, and all else
        equal; None: it is this row, or the method learns no prompt and thus has no modality.
        """
        learns = METHODS[row.method].pins.get("iterations") != 0
        if not (learns if key == MODALITY else key in row.settings):
            return None
        others = [
            other
            for other in self._of_method[row.method, *row.task[:2]]
            if key == MODALITY or (other.modality == row.modality and key in other.settings)
        ]
        equal = self._equal_rows(row, others, key)
        flat = self._points[row.cell, row.point][0].flat
        chosen = {name: value for name, value in flat.items() if name != key}
        defaults = {name: known.default for name, known in trial_keys().items()}
        default = (defaults | presets.defaults(row.method, chosen)).get(key)
        values = [other.value(key) for _, other in equal]
        value = default if default in values else values[0]
        if row.value(key) == value:
            return None
        return _closest([pair for pair in equal if pair[1].value(key) == value])

    def _equal_rows(self, row: Row, others: Iterable[Row], key: str = "") -> list[tuple[int, Row]]:
        """The rows with equal values for all settings that both have, and the number of these.

        Args:
            key: a setting that may differ, like those that were searched.
        """
        found, own = [], row.settings.keys() - self.searched(row) - {key}
        for other in others:
            shared = (own & other.settings.keys()) - self.searched(other)
            if all(row.settings[each] == other.settings[each] for each in shared):
                found.append((len(shared), other))
        return found

    def difference(self, row: Row, other: Row) -> Difference | None:
        """A row minus another; None if they have no run in common."""
        return paired_difference(self.runs(row), self.runs(other))

    def collapsed_runs(self, row: Row) -> list[Collapse]:
        """Runs of a row that are far below its other runs."""
        return collapsed_runs(self.runs(row)) if row.is_tested else []


def _closest(rows: Sequence[tuple[int, Row]]) -> Row | None:
    """The first row with the largest number of shared settings."""
    return max(rows, key=lambda pair: pair[0], default=(0, None))[1]


# ---------------------------------------------------------------- text


def protocol_notes(results: Results) -> list[str]:
    """Sentences for a caption: metric, chance, splits and seeds, interval."""
    rows, notes = results.rows, []
    for method in dict.fromkeys(row.method for row in rows if is_bound(row.method)):
        notes.append(f"{method} is {METHODS[method].summary}; it is no method.")
    notes += dict.fromkeys(_departure_note(row) for row in rows if row.departures)
    if any(row.metric == "harmonic_mean" for row in rows):
        notes.append("TRZSL: harmonic mean of the accuracies on seen and on unseen classes.")
    kinds = Counter(row.interval for row in results.tested)
    if not kinds:
        return [UNTESTED, *notes, splits_and_seeds(rows)]
    usual = kinds.most_common(1)[0][0]
    text = f"Interval: {usual}"
    for kind in kinds:
        if kind != usual:
            methods = dict.fromkeys(row.method for row in rows if row.interval == kind)
            text += f"; {', '.join(methods)}: {kind.removeprefix('95 % bootstrap ')}"
    return [*notes, *_chance_note(results), splits_and_seeds(rows), text + "."]


def _chance_note(results: Results) -> list[str]:
    levels = {
        row.dataset: f"{format_percent(chance)} ({plural(results.classes[row.dataset], 'class')})"
        for row in results.tested
        if (chance := results.chance(row)) is not None
    }
    named = [f"{name} {level}" for name, level in levels.items()]
    return [f"Chance: {', '.join(named if len(named) > 1 else levels.values())}."] if levels else []


def at_chance_notes(results: Results) -> list[str]:
    """Sentences on accuracies of a smoke run, or not above guessing or those of zero-shot CLIP.

    Every screen with an accuracy has them first.
    """
    if results.is_smoke:
        return [f"{SMOKE_ONLY[0].upper()}{SMOKE_ONLY[1:]}."]
    parts, below = [], []
    for task in results.tasks:
        where = f" in {task_text(task)}" if len(results.tasks) > 1 else ""
        methods = [row for row in results.tested if row.task == task and not is_bound(row.method)]
        rows = [row for row in methods if results.is_at_chance(row)]
        best = results.best_classifier(task)
        test, plain = (best.test, results.baseline(best.row, "zero_shot")) if best else (None, None)
        guesses = best and test and results.is_at_chance(best.row, test)
        names = [*dict.fromkeys(row_text(row, [*row.settings]) for row in rows)]
        if len(names) > MAX_NAMES:
            names[MAX_NAMES:] = [f"{len(names) - MAX_NAMES} more"]
        if len(rows) == len(methods) > 1:
            names = ["all methods" if guesses else "the text classifiers of all methods"]
        elif guesses:
            names = ["the best classifier", *names]
        if test and plain and test.mean < plain.mean:
            below.append(
                f"The best classifier{where} is below zero_shot ({format_percent(plain.mean)} %) "
                "on the test images, which did not choose it."
            )
        if names:
            level = format_percent(results.chance(methods[0]))
            parts.append(f"{', '.join(names)}{where} (chance {level} %)")
    if not parts:
        return below
    setup = any(
        presets.tests_setup_only(row.protocol.backbone, row.dataset) for row in results.rows
    )
    remedy = f"; {presets.SETUP_ONLY}" if setup else ""
    return [f"{AT_CHANCE}, by the 95 % interval: {'; '.join(parts)}{remedy}.", *below]


def chance_caution(right: int, total: int, classes: int, images: str = "images") -> str:
    """A sentence if a share is not above that of guessing, by its interval (Wilson 1927).

    >>> chance_caution(70, 100, 2)
    ''
    >>> chance_caution(55, 100, 2)
    'Not better than chance (50.0 %), by the 95 % interval: 55.0 % of 100 images are right.'
    """
    share, z2 = right / total, Z_95**2
    spread = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    if (share + z2 / (2 * total) - spread) / (1 + z2 / total) > 1 / classes:
        return ""
    return (
        f"{AT_CHANCE} ({format_percent(1 / classes)} %), by the 95 % interval: "
        f"{format_percent(share)} % of {total:,} {images} are right."
    )


def best_texts(results: Results) -> list[str]:
    """Texts on the best classifiers, which begin with the task if there are several."""
    several = len(results.tasks) > 1
    return [
        f"{task_text(task)}: {best}" if several else str(best)
        for task, best in results.best_classifiers.items()
    ]


def _departure_note(row: Row) -> str:
    """
    >>> from types import SimpleNamespace
    >>> print(_departure_note(SimpleNamespace(method="air", departures={"auxiliary.kind": "lda"})))
    air differs from its definition in auxiliary.kind: lda (prototype).
    """
    sets = METHODS[row.method].sets
    words = ", ".join(f"{key}: {value} ({sets[key]})" for key, value in row.departures.items())
    return f"{row.method} differs from its definition in {words}."


def splits_and_seeds(rows: Sequence[Row]) -> str:
    """The largest number of splits, and of seeds in a split, of the rows."""
    splits = max(row.protocol.splits for row in rows)
    seeds = max(1, *(row.protocol.seeds for row in rows))
    each = " each" if splits > 1 else ""
    return f"{plural(splits, 'split')}, {plural(seeds, 'seed')}{each}."


def collapse_notes(results: Results, most: int = 4) -> list[str]:
    """Sentences on runs that are far below the other runs of their row."""
    collapses = [(row, run) for row in results.rows for run in results.collapsed_runs(row)]
    notes = []
    for row, run in collapses[:most]:
        task = f"{task_text(row.task)}, " if len(results.tasks) > 1 else ""
        seed = "" if run.seed is None else f", seed {run.seed}"
        notes.append(
            f"Collapsed run: {task}{row_text(row, list(row.settings))}, split {run.split_seed}"
            f"{seed} has accuracy {format_percent(run.score)}, the other runs "
            f"{format_percent(run.others)}; the mean includes it."
        )
    if len(collapses) > most:
        notes.append(f"{plural(len(collapses) - most, 'more run')} collapsed.")
    return notes


def _corrected_over(comparisons: Sequence[Comparison]) -> str:
    """The comparisons that p values are corrected over; empty if there is one of each question."""
    sizes = Counter((c.baseline.task, c.role) for c in comparisons)
    if max(sizes.values()) < 2:
        return ""
    largest: dict[str, int] = {}
    for (_, role), size in sizes.items():
        largest[role] = max(size, largest.get(role, 0))
    several = len({task for task, _ in sizes}) > 1
    tasks = " in each dataset, paradigm and modality" if several else ""
    up_to = "up to " if several else ""
    named = {role: f"with the {role}" if role in MARKS else f"of {role}" for role in largest}
    counts = (f"over {up_to}{plural(n, 'comparison')} {named[r]}" for r, n in largest.items())
    return f", Holm-corrected{tasks} {' and '.join(counts)}; intervals are not corrected"


def significance_notes(comparisons: Sequence[Comparison], *, marks: bool = True) -> list[str]:
    """Sentences for a caption on the level of significance; empty if nothing is tested.

    Args:
        marks: whether the table has marks, else it has columns `significant` and `detectable`.
    """
    if not any(c.is_tested for c in comparisons):
        return []
    over = _corrected_over(comparisons)
    notes = [
        f"Significant: p < {ALPHA:g}{over}.",
        "Detectable: smallest difference, in points, that is significant with 80 % power; it grows "
        "with the number of comparisons and the variance between all their runs.",
    ]
    if marks:
        names = {"host": "the host", "control": "the control"}
        roles = {c.role for c in comparisons}
        signs = ", ".join(f"{MARKS[role]} from {names[role]}" for role in MARKS if role in roles)
        worse = f" ({WORSE} below it)" if any(c.mark.endswith(WORSE) for c in comparisons) else ""
        notes = [f"Significantly different: {signs}{worse} (p < {ALPHA:g}{over})."]
    return [*notes, *one_split_notes(comparisons)]


def one_split_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence if all tested differences are of one split."""
    tested = [c for c in comparisons if c.is_tested]
    if not tested or not all("1 split" in c.difference.interval for c in tested):
        return []
    return ["With one split, significance holds for that split and its images only."]


def comparison_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence on differences that contain the gain of a search, and one for each reason why
    differences are not tested."""
    every = Counter(c.name for c in comparisons)
    unequal = dict.fromkeys(
        c.name for c in comparisons if c.role in MARKS and c.row.is_chosen != c.baseline.is_chosen
    )
    reasons: dict[str, Counter[str]] = {}
    for c in comparisons:
        if reason := c.difference.reason_not_tested:
            reasons.setdefault(reason, Counter())[c.name] += 1
    notes = []
    if unequal:
        notes.append(
            "Only one side has settings that a search chose, and the difference contains what it "
            f"gained: {', '.join(unequal)}."
        )
    for reason, untested in reasons.items():
        names = (
            name if count == every[name] else f"{name} in {count} of {every[name]} comparisons"
            for name, count in untested.items()
        )
        notes.append(f"Not tested: {', '.join(names)} ({reason}).")
    return notes


def settings_text(row: Row, keys: Iterable[str]) -> str:
    return ", ".join(
        f"{key} {format_value(row.settings[key])}" for key in keys if key in row.settings
    )


def method_text(method: str) -> str:
    """
    >>> method_text("air"), method_text("air_ceiling")
    ('air', 'air_ceiling (bound)')
    """
    return method + BOUND * is_bound(method)


def row_text(row: Row, keys: Sequence[str]) -> str:
    """The method of a row, followed by the settings that `keys` names."""
    text = settings_text(row, keys)
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


def signed_interval(interval: Interval) -> str:
    mean, low, high = map(signed_percent, (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def signed_percent(value: float) -> str:
    """
    >>> signed_percent(0.021), signed_percent(-0.00001)
    ('+2.1', '+0.0')
    """
    return f"{round(100 * value, 1) + 0.0:+.1f}"
