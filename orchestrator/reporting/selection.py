"""Selects the row, the run and the classifier of a sweep that `airsweep export best` exports.

A trial has up to three classifiers. Every classifier of every row is a candidate; its score is the
mean of a measure over the row's runs. Test labels select nothing unless `test_accuracy` is named.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from air_core.bundle.checks import CLASSIFIERS
from air_core.specs import TrialSpec
from air_core.specs.normal import normalised
from orchestrator.formatting import format_percent, plural, show
from orchestrator.planning import plan_of
from orchestrator.planning.requests import run_command
from orchestrator.reporting.results import TABLE_COLUMNS, results_of
from orchestrator.reporting.rows import Results, Row, is_bound, row_text, tasks_of
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.sweep_file import only_values
from orchestrator.store import SweepLocation, TrialRecord, read_trial

BEST = "best"
TEST = "test_accuracy"
METRICS = {
    "validation_accuracy": "objective/validation_accuracy_{}",
    "agreement": "objective/agreement_{}",
    TEST: "test/accuracy_{}",
}
MEASURES = {
    "validation_accuracy": "accuracy on validation images",
    "agreement": "agreement with the other classifiers on the pool, which uses no labels",
    TEST: "accuracy on test images",
}


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
        by: of `MEASURES`. Default: the first that all candidates have.
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
    by, scores = candidate_scores(results, rows, by, classifier)
    means = {of: fmean(values.values()) for of, values in scores.items()}
    best = max(means, key=lambda of: means[of])  # the first of equal ones
    row, chosen = rows[best[0]], best[1]
    key = max(scores[best], key=lambda key: scores[best][key])
    slot = next(slot for slot in plan.slots if slot.key.digest == key)
    record = read_trial(slot.spec, location.store)
    accuracy = results.mean(row, f"test/accuracy_{chosen}")
    selection = {
        "row": {"method": row.method, "settings": row.settings, "mean": accuracy, "n": row.n},
        "classifier": chosen,
        "candidates": len(scores),
        "by": by,
        "score": means[best],
        "trials_left": plan.to_run,
        "note": CAVEAT if by == TEST and len(scores) > 1 else None,
    }
    report_line(
        f"selected: {chosen} classifier of {row_text(row, [*row.settings])}: of "
        f"{plural(len(scores), 'classifier')} in {plural(len(rows), 'row')} the highest "
        f"{MEASURES[by]}, {format_percent(means[best])} %"
    )
    report_line(f"run:      {slot.id}" + (f", the highest of {row.n}" if row.n > 1 else ""))
    if accuracy is not None:
        own = format_percent(record.metrics[f"test/accuracy_{chosen}"])
        report_line(
            f"test:     {own} % in this run, {format_percent(accuracy)} % over "
            f"{plural(row.n, 'run')}; not used to select"
            if by != TEST
            else f"test:     {own} % in this run"
        )
    if selection["note"]:
        report_line(f"note:     {CAVEAT}")
    if plan.to_run:
        left = plural(plan.to_run, "trial")
        report_line(f"note:     the sweep has {left} left to run, which may change the selection")
    return SelectedTrial(
        normalised(slot.spec), record, location.full_name, slot.id, selection, chosen
    )


def candidate_scores(
    results: Results, rows: Sequence[Row], by: str | None = None, classifier: str | None = None
) -> tuple[str, dict[tuple[int, str], dict[str, float]]]:
    """Score each classifier of each row by a measure that all of them have.

    Args:
        by: of `MEASURES`. Default: the first one without test labels that all candidates have.
        classifier: the only candidate of each row.

    Returns:
        The measure, and the scores of each run by the key of its trial, by row and classifier.

    Raises:
        ValueError: `by` is not a measure, or some candidates lack it.
    """
    if by is not None and by not in MEASURES:
        raise ValueError(f"unknown --by {by!r}; allowed: {', '.join(MEASURES)}")
    candidates = {}
    for i, row in enumerate(rows):
        trials = [*results.distinct_trials(row).values()]
        for name in CLASSIFIERS if classifier is None else (classifier,):
            if all(name in trial.by_classifier for trial in trials):
                candidates[i, name] = trials
    if not candidates:
        raise ValueError(
            f"no finished row has a {classifier or 'recorded'} classifier; an older version "
            "recorded text classifiers alone"
        )
    for measure in [name for name in MEASURES if name != TEST] if by is None else [by]:
        scores = {
            of: {t.key: t.metrics.get(METRICS[measure].format(of[1]), math.nan) for t in trials}
            for of, trials in candidates.items()
        }
        if not any(math.isnan(value) for of_run in scores.values() for value in of_run.values()):
            return measure, scores
    raise ValueError(
        f"some classifiers have no {by or 'measure that needs no test labels'}, so they cannot be "
        "compared; give another --by, or restrict them by --only or --classifier"
    )


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
