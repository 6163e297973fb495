"""Selects the row, the run and the classifier of a sweep that `airsweep export best` exports.

A trial has up to three classifiers. Every classifier of every row is a candidate; its score is the
mean accuracy of the row's runs on validation images. Without validation images the order of methods
in docs/experiments.md selects: scores without labels choose worse. Test labels select nothing
unless `test_accuracy` is named.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from air_core.bundle.checks import CLASSIFIERS
from air_core.methods import PREFERENCE
from air_core.specs import TrialSpec
from air_core.specs.normal import normalised
from orchestrator.formatting import format_percent, plural, show
from orchestrator.planning import plan_of
from orchestrator.planning.requests import run_command
from orchestrator.reporting.results import TABLE_COLUMNS, results_of
from orchestrator.reporting.rows import (
    FinishedTrial,
    Results,
    Row,
    at_chance_notes,
    is_bound,
    row_text,
    tasks_of,
)
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.sweep_file import only_values
from orchestrator.store import SweepLocation, TrialRecord, read_trial

BEST = "best"
VALIDATION, EXPERIMENTS, TEST = "validation_accuracy", "experiments", "test_accuracy"
METRICS = {VALIDATION: "objective/validation_accuracy", TEST: "test/accuracy"}
MEASURES = {
    VALIDATION: "accuracy on validation images",
    EXPERIMENTS: (
        "the best method on the digits (docs/experiments.md), since no validation image is outside "
        "the pool"
    ),
    TEST: "accuracy on test images",
}
RUN_BY = "objective/mutual_information"  # selects a run of a row without labels
CAVEAT = (
    "The test images selected the classifier, so its accuracy on new images is likely to be lower."
)


@dataclass(frozen=True)
class SelectedTrial:
    """A finished trial to export."""

    spec: TrialSpec
    record: TrialRecord
    sweep: str | None  # PROJECT/NAME
    slot: str | None
    selection: Mapping[str, Any] | None = None  # how `best` selected it; None: given by name
    classifier: str | None = None  # None: given by name


def best_trial(
    sweep: SweepSpec,
    location: SweepLocation,
    only: Sequence[str] = (),
    by: str | None = None,
    classifier: str | None = None,
) -> SelectedTrial:
    """The run and the classifier with the highest measure in the row with the highest mean.

    A row of a searched cell is the point that the table shows.

    Args:
        only: `key=value[,value]` each; restrict the rows to these cells of the grid.
        by: of `MEASURES`. Default: validation_accuracy; experiments without validation images.
        classifier: restrict the candidates to text, auxiliary or fused.

    Raises:
        ValueError: no trial is finished, the rows belong to several tasks, or a candidate lacks the
            measure.
    """
    plan = plan_of(sweep, location)
    results = results_of(plan, location.store)
    cells = _cells(plan.cells, only_values(sweep, only))
    rows = [row for row in results.rows if row.cell in cells and not is_bound(row.method)]
    if not rows:
        raise ValueError(_no_candidates(location, only, results.rows))
    tasks = tasks_of(rows)
    if len(tasks) > 1:
        listed = "; ".join("/".join(task) for task in tasks)
        keys = [key for key in TABLE_COLUMNS if key in sweep.grid and key != "method"] or ["method"]
        raise ValueError(
            f"{sweep.name} has no single best row, because these cannot be compared: {listed}; "
            f"give --only KEY=VALUE with {', '.join(keys)}"
        )
    found = best_candidate(results, rows, by, classifier)
    row, name = found.row, found.classifier
    slot = next(slot for slot in plan.slots if slot.key.digest == found.trial.key)
    caveat = CAVEAT if found.by == TEST and found.candidates > 1 else None
    accuracy = results.mean(row, f"test/accuracy_{name}")
    report_line(f"selected: {found}")
    by_run = "mutual information" if found.score is None else MEASURES[found.by]
    of_runs = f", of {row.n} runs the highest {by_run}" if row.n > 1 else ""
    report_line(f"run:      {slot.id}{of_runs}")
    if accuracy is not None:
        own = format_percent(found.trial.metrics[f"test/accuracy_{name}"])
        report_line(
            f"test:     {own} % in this run, {format_percent(accuracy)} % over "
            f"{plural(row.n, 'run')}"
        )
    for note in (*([caveat] if caveat else []), *at_chance_notes(results, [row])):
        report_line(f"note:     {note}")
    if plan.to_run:
        left = plural(plan.to_run, "trial")
        report_line(f"note:     the sweep has {left} left to run, which may change the selection")
    return SelectedTrial(
        normalised(slot.spec),
        read_trial(slot.spec, location.store),
        location.full_name,
        slot.id,
        {
            "row": {"method": row.method, "settings": row.settings, "mean": accuracy, "n": row.n},
            "classifier": name,
            "candidates": found.candidates,
            "by": found.by,
            "score": found.score,
            "trials_left": plan.to_run,
            "note": caveat,
        },
        name,
    )


@dataclass(frozen=True)
class Candidate:
    """The classifier of a row with the highest score."""

    row: Row
    classifier: str
    by: str  # of `MEASURES`
    score: float | None  # mean over the runs of the row; None: by the order of methods
    trial: FinishedTrial  # the run with the highest score
    candidates: int  # classifiers that were compared

    def __str__(self) -> str:
        name = f"{self.classifier} classifier of {row_text(self.row, [*self.row.settings])}"
        if self.score is None:
            return f"{name}: {MEASURES[self.by]}"
        return (
            f"{name}: of {plural(self.candidates, 'classifier')} the highest {MEASURES[self.by]}, "
            f"{format_percent(self.score)} %"
        )


def best_candidate(
    results: Results, rows: Sequence[Row], by: str | None = None, classifier: str | None = None
) -> Candidate:
    """The best of the classifiers of rows.

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
    if by != EXPERIMENTS:
        metric = METRICS[by or VALIDATION]
        scores = {
            (i, name): [_value(trial, metric, name) for trial in trials]
            for (i, name), trials in runs.items()
        }
        if not any(map(math.isnan, chain(*scores.values()))):
            i, name = max(scores, key=lambda of: fmean(scores[of]))  # the first of equal ones
            of_runs = scores[i, name]
            trial = runs[i, name][of_runs.index(max(of_runs))]
            mean = fmean(of_runs)
            return Candidate(rows[i], name, by or VALIDATION, mean, trial, len(scores))
        if by is not None:
            raise ValueError(
                f"some classifiers have no {by}: there are no images for it; give another --by: "
                f"{', '.join(name for name in MEASURES if name != by)}"
            )
    # The fused classifier of the first method in the order, where it has one.
    i, name = min(runs, key=lambda of: (_rank(rows[of[0]].method), -CLASSIFIERS.index(of[1])))
    trial = max(runs[i, name], key=lambda trial: _value(trial, RUN_BY, name))
    return Candidate(rows[i], name, EXPERIMENTS, None, trial, len(runs))


def _rank(method: str) -> int:
    return PREFERENCE.index(method) if method in PREFERENCE else len(PREFERENCE)


def _value(trial: FinishedTrial, metric: str, classifier: str) -> float:
    """A metric of a classifier; NaN without it."""
    return trial.metrics.get(f"{metric}_{classifier}", math.nan)


def report_line(line: str) -> None:
    """Print a line on stderr; stdout contains only the folder."""
    show(line, file=sys.stderr)


def _cells(cells: Iterable[Cell], only: Mapping[str, Sequence[Any]]) -> set[str]:
    """Ids of the cells whose settings have one of these values for each key that they have."""
    ids = set()
    for cell in cells:
        flat = {**cell.flat, "method": cell.method}
        settings = cell.chosen | {key: flat.get(key) for key in TABLE_COLUMNS}
        if all(key not in settings or settings[key] in values for key, values in only.items()):
            ids.add(cell.id)
    return ids


def _no_candidates(location: SweepLocation, only: Sequence[str], every: Sequence[Row]) -> str:
    if not every:
        return f"no trial of {location.name} is done yet; run `{run_command(location)}` first"
    rows = "; ".join(dict.fromkeys(f"{'/'.join(row.task)} {row.method}" for row in every))
    return (
        f"--only {' --only '.join(only)}: no finished trial of {location.name} matches; "
        f"finished: {rows}"
    )
