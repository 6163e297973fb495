"""Selects the trial that `airsweep export` exports: by its slot or key, or `best`, one of the best
classifier, by the rule of `candidates.best_candidate`. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.formatting import format_percent, plural, show
from orchestrator.keys import ArtifactKey, from_plain
from orchestrator.planning.history import read_history
from orchestrator.planning.ledger import Ledger
from orchestrator.planning.requests import run_command
from orchestrator.reporting.candidates import MEASURES, SCORES, TEST, best_candidate
from orchestrator.reporting.notes import at_chance_notes
from orchestrator.reporting.results import TABLE_COLUMNS, TASK_KEYS, results_of
from orchestrator.reporting.rows import Row, is_bound, tasks_of
from orchestrator.spec import Cell
from orchestrator.spec.sweep_file import only_values
from orchestrator.stages import TrialSpec
from orchestrator.store import ArtifactStore, SweepLocation, TrialRecord, read_trial

BEST = "best"
MIN_DIGITS = 6  # of a key
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
    ledger: Ledger,
    location: SweepLocation,
    only: Sequence[str] = (),
    by: str | None = None,
    classifier: str | None = None,
) -> SelectedTrial:
    """The best run of the best classifier of a task, see `best_candidate`.

    A row of a searched cell is the point that the table shows.

    Args:
        only: `key=value[,value]` each; restrict the rows to these cells of the grid.
        by, classifier: as for `best_candidate`.

    Raises:
        ValueError: no trial is finished, the rows belong to several tasks, or a candidate lacks the
            measure.
    """
    results, grid = results_of(ledger, location.store), ledger.about.grid
    cells = _cells(ledger.cells, only_values(grid, only))
    rows = [row for row in results.rows if row.cell in cells and not is_bound(row.method)]
    if not rows:
        raise ValueError(_no_candidates(location, only, results.rows))
    tasks = tasks_of(rows)
    if len(tasks) > 1:
        listed = "; ".join("/".join(task) for task in tasks)
        keys = [key for key in TASK_KEYS if key in grid] or ["method"]
        raise ValueError(
            f"{location.name} has a best classifier for each of {listed}, which cannot be "
            f"compared; give --only KEY=VALUE with {', '.join(keys)}"
        )
    found = best_candidate(rows, by, classifier)
    row, name = found.row, found.classifier
    slot = next(slot for slot in ledger.slots if slot.key.digest == found.trial.key)
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
    if ledger.to_run:
        left = plural(ledger.to_run, "trial")
        lines.append(f"note:     the sweep has {left} left to run, which may change the selection")
    record = read_trial(slot.key, location.store)
    return SelectedTrial(
        trial_spec(record),
        record,
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
            "trials_left": ledger.to_run,
            "note": caveat,
        },
        name,
        lines,
    )


def trial_spec(record: TrialRecord) -> TrialSpec:
    """The spec of a trial from its record.

    Raises:
        ValueError: the settings of this version of the code are others.
    """
    try:
        spec: TrialSpec = from_plain(TrialSpec, record.spec)
        return spec
    except TypeError:
        raise ValueError(
            f"{record.path.name} was computed by another version of the code, with which its "
            f"prompt may not be compatible; check out commit {record.provenance.get('commit')}"
        ) from None


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


# ---------------------------------------------------------------- by slot or key


def named_trial(
    name: str, store: ArtifactStore, location: SweepLocation | None = None
) -> SelectedTrial:
    """Find a trial by its key, the first digits of it or its slot, and read its record.

    Args:
        location: the sweep that the trial must be part of. None: any sweep; then by key only.

    Raises:
        ValueError: no trial or several trials match, the trial is not part of the sweep, or another
            version of the code computed it.
    """
    slots = {} if location is None else _finished_slots(location)
    key = slots.get(name, name)
    found = store.find_by_digest(TrialSpec, key) if len(key) >= MIN_DIGITS else []
    if len(found) != 1:
        raise ValueError(
            f"{len(found) or 'no'} trial keys in {store.name} start with {name!r}; give at least "
            f"{MIN_DIGITS} digits of a key, or a slot CELL/POINT/SEEDS and its sweep; "
            "`airsweep logs NAME` shows both"
        )
    record = read_trial(_key_of(found[0]), store)
    spec = trial_spec(record)
    if location is None:
        return SelectedTrial(spec, record, None, None)
    matches = [slot for slot, digest in slots.items() if digest == record.key]
    if not matches:
        raise ValueError(
            f"{record.path.name} is not a finished trial of the sweep {location.full_name}; omit "
            "--sweep, or give the sweep of the trial"
        )
    slot = name if name in matches else matches[0]
    return SelectedTrial(spec, record, location.full_name, slot)


def _key_of(record: dict[str, Any]) -> ArtifactKey:
    stage, recipe, folder = record["key"].split("/")
    return ArtifactKey(stage, int(recipe[1:]), record["digest"], folder.rpartition("-")[0])


def _finished_slots(location: SweepLocation) -> dict[str, str]:
    """The last key of each finished slot of a sweep."""
    outcomes = read_history(location.event_log()).outcomes.items()
    return {slot: event["key"] for slot, event in outcomes if event["event"] != "trial_failed"}
