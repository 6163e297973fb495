"""Selects the run that `airsweep export best` exports: one of the sweep's best classifier.

`rows.best_candidate` has the rule. Test labels select nothing unless `test_accuracy` is named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.formatting import format_percent, plural, show
from orchestrator.planning import plan_of
from orchestrator.planning.requests import run_command
from orchestrator.reporting.candidates import MEASURES, SCORES, TEST, best_candidate
from orchestrator.reporting.notes import at_chance_notes
from orchestrator.reporting.results import TABLE_COLUMNS, TASK_KEYS, results_of
from orchestrator.reporting.rows import Row, is_bound, tasks_of
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.sweep_file import only_values
from orchestrator.stages import TrialSpec
from orchestrator.store import SweepLocation, TrialRecord, read_trial

BEST = "best"
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
    lines: Sequence[str] = ()  # about the selection, for the screen


def best_trial(
    sweep: SweepSpec,
    location: SweepLocation,
    only: Sequence[str] = (),
    by: str | None = None,
    classifier: str | None = None,
) -> SelectedTrial:
    """The best run of the best classifier of a task, see `best_candidate`.

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
        keys = [key for key in TASK_KEYS if key in sweep.grid] or ["method"]
        raise ValueError(
            f"{sweep.name} has a best classifier for each of {listed}, which cannot be compared; "
            f"give --only KEY=VALUE with {', '.join(keys)}"
        )
    found = best_candidate(rows, by, classifier)
    row, name = found.row, found.classifier
    slot = next(slot for slot in plan.slots if slot.key.digest == found.trial.key)
    caveat = CAVEAT if found.by == TEST and found.candidates > 1 else None
    which = MEASURES[found.by] if found.score is not None else "the highest in mutual information"
    own = found.trial.metrics.get(f"{SCORES[TEST]}_{name}") if found.test else None
    lines = at_chance_notes(results) if results.is_smoke else []
    lines += [
        f"selected: {found}",
        f"run:      {slot.id}"
        + (f", of {row.n} runs {which}" if row.n > 1 else "")
        + ("" if own is None else f", test {format_percent(own)} %"),
    ]
    if caveat:
        lines.append(f"note:     {caveat}")
    if plan.to_run:
        left = plural(plan.to_run, "trial")
        lines.append(f"note:     the sweep has {left} left to run, which may change the selection")
    return SelectedTrial(
        slot.spec,
        read_trial(slot.spec, location.store),
        location.full_name,
        slot.id,
        {
            "row": {
                "method": row.method,
                "settings": row.settings,
                "mean": found.test.mean if found.test else None,
                "n": row.n,
            },
            "classifier": name,
            "candidates": found.candidates,
            "by": found.by,
            "score": found.score,
            "trials_left": plan.to_run,
            "note": caveat,
        },
        name,
        lines,
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
