"""Summary of a sweep's results and of its last run, for the closing screen and for trackers.

This module does not import torch.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence

from air_core.bundle.content import modalities
from air_core.datasets.image_folder import PREFIX
from orchestrator.environment import in_ray_job
from orchestrator.formatting import aligned, aligned_table, format_duration
from orchestrator.planning.history import results_text
from orchestrator.planning.ledger import Ledger
from orchestrator.planning.requests import results_command, run_command, store_command
from orchestrator.reporting.candidates import Candidate
from orchestrator.reporting.comparisons import BEST, Results
from orchestrator.reporting.notes import (
    EMPTY,
    UNTESTED,
    answers,
    at_chance_notes,
    best_texts,
    collapse_notes,
    comparison_notes,
    one_split_notes,
)
from orchestrator.reporting.results import holes_text
from orchestrator.reporting.rows import is_bound, metric_text
from orchestrator.reporting.tables import SPARE, column_notes, table_lines
from orchestrator.stages.dataset_text import dataset_description, images_text, unused_by_dataset
from orchestrator.store import SweepLocation, read_outcome, read_resolved

MAX_ROWS, MAX_ANSWERS = 10, 3
# Columns that the screen leaves out; `airsweep table` has them.
HIDDEN = ("test images", "auxiliary", "pseudo-labels", "gain over host", "gain over control")
NEXT = "next"  # label of the commands, which are not broken


def summary(
    title: str,
    results: Results,
    facts: Sequence[tuple[str, str]],
    *,
    width: int = 100,
    table: str = "airsweep table",
    report: str = "airsweep report",
) -> str:
    """The screen at the end of a run, at most `width` columns wide.

    Args:
        title: name and data of the sweep; the paradigm and modality are appended.
        facts: (label, text) lines below the table; an empty label for a plain line.
        width: of the terminal.
        table, report: the commands that show all rows and all answers.
    """
    tail = [f"{paradigm}/{modality}" for _, paradigm, modality in results.tasks]
    unit = [f"test {metric_text(results.rows)}"] if results.tested else []
    lines = _wrap("   ".join([title, *(tail if len(tail) == 1 else []), *unit]), width)
    if not results.rows:
        return "\n".join([*lines, f" {EMPTY}", *_facts(facts, width)])
    for note in at_chance_notes(results):
        lines += _wrap(note, width)
    bests = [*results.best_classifiers.values()][:MAX_ROWS]
    spare = [name for name in SPARE if name not in {best.classifier for best in bests}]
    rows = _rows(results, bests)
    lines += [f" {line}" for line in aligned_table(rows, width - 1, spare)]
    if len(results.rows) > MAX_ROWS:
        lines.append(f" {MAX_ROWS} of {len(results.rows)} rows; all: {table}")
    above = [
        ("answers", "\n".join(answers(results, MAX_ANSWERS, report))),
        ("caution", next(_cautions(results), "")),
        ("best", "\n".join(f"{BEST}{text}" for text in best_texts(results)[:MAX_ROWS])),
        ("columns", "" if results.tested else " ".join(column_notes(rows[0]))),
    ]
    return "\n".join([*lines, *_facts([*above, *facts], width)])


def _rows(results: Results, bests: Sequence[Candidate]) -> list[dict[str, str]]:
    """Cells of the best classifiers' rows and the highest others, in the order of the table."""
    best_rows = {best.row for best in bests}
    highest = sorted(
        results.rows,
        key=lambda row: (
            *(row not in best_rows, is_bound(row.method)),
            -row.mean if row.is_tested else 0.0,
        ),
    )
    kept = {*highest[:MAX_ROWS]}
    hidden = {*HIDDEN} - {best.classifier for best in bests}
    lines = []
    for row, cells in zip(results.rows, table_lines(results), strict=True):
        if row not in kept:
            continue
        line = {name: text for name, text in cells.items() if name not in hidden}
        if row.is_tested and "text" not in line:  # no other column has the text classifier
            line = {"text" if name == "accuracy" else name: line[name] for name in line}
        lines.append(line)
    return lines


def _cautions(results: Results) -> Iterator[str]:
    """Reasons to doubt the table, the most serious first."""
    if not results.tested:
        yield UNTESTED
    yield from collapse_notes(results, most=1)
    yield from comparison_notes(results.all_comparisons)
    yield from one_split_notes(results.all_comparisons)


def _facts(facts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Texts next to their labels, in lines of at most `width`, except those of commands."""
    facts = [(label, text) for label, text in facts if text]
    labels = max((len(label) for label, _ in facts), default=0)
    lines = []
    for label, text in facts:
        lead = f"{label:<{labels}}   " if label else ""
        for part in text.splitlines():
            lines += [f" {lead}{part}"] if label == NEXT else _wrap(part, width, lead)
            lead = " " * len(lead)
    return lines


def _wrap(text: str, width: int, lead: str = "") -> list[str]:
    indent = " " * (len(lead) + len(text) - len(text.lstrip()) + 3)
    return textwrap.wrap(
        text,
        width,
        initial_indent=f" {lead}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


# ---------------------------------------------------------------- facts


def sweep_title(ledger: Ledger) -> str:
    """The name of a sweep and a description of its data."""
    return f"airsweep {ledger.about.name}   {data_text(ledger)}"


def data_text(ledger: Ledger) -> str:
    """The datasets of a sweep, and whether their labels are used."""
    flats = [slot.cell.flat for slot in ledger.slots]
    refs = {ledger.data[flat["dataset"]].ref for flat in flats}
    texts = sorted(f"{dataset_description(ref.name)}{images_text(ref)}" for ref in refs)
    description = ", ".join(texts)
    if all(flat["paradigm"] == "ul" for flat in flats):
        description += ", trained without labels (ul)"
    tested = {flat.get("test_dataset") for flat in flats}
    if len(tested) == 1 and (name := tested.pop()):  # of several, the table has a column
        description += f", tested on {dataset_description(ledger.data[name].ref.name)}"
    return description


def run_facts(ledger: Ledger, location: SweepLocation) -> list[tuple[str, str]]:
    """Counts of trials and images, and the time of the last run, as (label, text)."""
    seconds = read_outcome(location).get("seconds")
    time = "" if seconds is None else f"; the last run took {format_duration(seconds)}"
    left = f", {ledger.to_run} left to run" if ledger.to_run else ""
    counts = ledger.counts
    trials = f"{ledger.total}: {results_text(counts)}, {counts['failed']} failed{left}"
    return [
        ("options", ledger.about.options),
        ("not used", "\n".join(unused_lines(ledger, location))),
        ("trials", f"{trials}{time}"),
        ("failed", "\n".join(failed_lines(ledger))),
    ]


def failed_lines(ledger: Ledger) -> list[str]:
    """The first reasons of failed trials, each with their cells."""
    cells: dict[str, dict[str, None]] = {}
    for slot, event in ledger.failures.items():
        cells.setdefault(event["message"], {})[slot.split("/")[0]] = None
    return [f"{', '.join(of)}: {message}" for message, of in cells.items()][:MAX_ANSWERS]


def unused_lines(ledger: Ledger, location: SweepLocation) -> list[str]:
    """Real and synthetic images that no trial reads: a line for each dataset, one for holes."""
    unused, history = unused_by_dataset(ledger.features, location.store), ledger.history
    lines = [f"{name}: {images}" for name, images in unused.items()]
    return [*lines, *filter(None, [holes_text(history.images)])]


def next_fact(
    ledger: Ledger, location: SweepLocation, results: Results, width: int
) -> tuple[str, str]:
    """Commands to run next, each with its purpose: beside it, or below it if a line is too long."""
    steps = _steps(ledger, location, results)
    lines = aligned(steps)
    if max(map(len, lines)) > width - len(" caution   "):
        lines = [line for command, purpose in steps for line in (command, f"   {purpose}")]
    return NEXT, "\n".join(lines)


def _steps(ledger: Ledger, location: SweepLocation, results: Results) -> list[tuple[str, str]]:
    if read_resolved(location).get("smoke"):
        again = run_command(location)
        whole = shlex.join(w for w in shlex.split(again) if w != "--smoke")
        table = (results_command("table", location), "the table of this smoke run")
        step = (again, "the rest of the smoke run") if ledger.to_run else (whole, "the whole sweep")
        if failed_lines(ledger):  # the same run would fail again
            step = (results_command("status", location), "the failures, and what to do")
        return [step, table] if results.rows else [step]
    steps = []
    if ledger.to_run:
        again = "submit it again" if in_ray_job() else run_command(location)
        steps.append((again, "the rest of the sweep"))
    if not results.rows:
        return steps
    if not results.tested:
        steps.append(
            (results_command("sample", location), "draws images to label, to measure accuracy")
        )
    steps.append((results_command("table", location), "differences, notes and more columns"))
    steps.append((results_command("report", location), "curves and images in one page"))
    bests = [*results.best_classifiers.values()]
    if len(bests) == 1 and bests[0].row.modality in modalities():
        command = results_command("export best --sweep", location, "-o", "bundle")
        steps.append((command, "the classifier marked *"))
    if not any(data.ref.name.startswith(PREFIX) for data in ledger.data.values()):
        steps.append(("airsweep init mine --images DIR", "a sweep of your own images"))
    steps.append((store_command("ui", location), "all runs, on http://127.0.0.1:5000"))
    return steps
