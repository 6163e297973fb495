"""The best of the classifiers of some rows: the one that every screen marks with `*`, and that
`airsweep export best` exports. Test labels do not select it, unless `test_accuracy` is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from air_core.bundle.checks import CLASSIFIERS
from air_core.methods import PREFERENCE
from orchestrator.formatting import format_percent, plural
from orchestrator.reporting._statistics import Interval, mean_interval
from orchestrator.reporting.rows import FinishedTrial, Row, row_text

MUTUAL_INFORMATION = "objective/mutual_information"  # of the text classifier on the pool
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
        text = f"{self.classifier} classifier of {row_text(self.row)}"
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


def best_candidate(
    rows: Sequence[Row], by: str | None = None, classifier: str | None = None
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
    ranked = [
        (row, name)
        for row in rows
        for name in (CLASSIFIERS if classifier is None else (classifier,))
        if all(name in trial.by_classifier for trial in row.trials.values())
    ]
    if not ranked:
        raise ValueError(f"no finished row has a {classifier or 'recorded'} classifier")
    # The fused classifier of the first method in the order, where it has one.
    order = {method: rank for rank, method in enumerate(PREFERENCE)}
    ranked.sort(key=lambda of: (order.get(of[0].method, len(order)), -CLASSIFIERS.index(of[1])))

    def scores(metric: str, row: Row, name: str) -> list[float]:
        runs = row.trials.values()
        return [trial.metrics.get(f"{metric}_{name}", math.nan) for trial in runs]

    metric = SCORES.get(by or VALIDATION, "")
    # Rounded, since equal ones differ in the last digits.
    means = [round(fmean(scores(metric, *of)), 9) for of in ranked]
    best, score, tied = 0, None, list[str]()
    if not any(map(math.isnan, means)):
        by = by or VALIDATION
        score = max(means)
        best, *same = (i for i, mean in enumerate(means) if mean == score)
        tied = [f"{name} of {row_text(row)}" for row, name in (ranked[i] for i in same)]
    elif by in (None, EXPERIMENTS):
        by, metric = EXPERIMENTS, MUTUAL_INFORMATION
    else:
        raise ValueError(
            f"some classifiers have no {by}: there are no images for it; give another --by: "
            f"{', '.join(name for name in MEASURES if name != by)}"
        )
    row, name = ranked[best]
    of_runs = scores(metric, row, name)
    trial = [*row.trials.values()][of_runs.index(max(of_runs))]
    test: Interval | None = None
    mean = row.average(f"{SCORES[TEST]}_{name}") if row.is_tested else None
    if mean is not None:  # the table's number
        test = replace(mean_interval(row.runs(name)), mean=mean)
    images = row.average("validation/images") if by == VALIDATION else None
    return Candidate(row, name, by, score, test, trial, len(ranked), tied, images)
