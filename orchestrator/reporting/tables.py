"""Results as tables: Markdown, CSV and JSON, with the protocol in the caption.

A table has one line per row with all its numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from orchestrator.formatting import csv_cell, format_interval, format_percent, format_value
from orchestrator.reporting._layouts import Layout, grid, markdown, without
from orchestrator.reporting.candidates import MUTUAL_INFORMATION
from orchestrator.reporting.comparisons import BEST, MARKS, Comparison, Results
from orchestrator.reporting.notes import (
    EMPTY,
    at_chance_notes,
    best_texts,
    collapse_notes,
    comparison_notes,
    protocol_notes,
    search_answers,
    significance_notes,
)
from orchestrator.reporting.rows import (
    BOUND,
    FIELDS,
    Row,
    is_bound,
    mean_std,
    method_text,
    task_text,
)

if TYPE_CHECKING:
    from pandas import DataFrame

WIDTH = 100  # characters of a line
TASK = ("dataset", "paradigm", "modality")  # columns; left out if all rows have the same value
TESTED = ("text", "fused", "auxiliary")  # classifiers that a trial tests on the same images
AGREEMENT = "objective/agreement_text"
MARKED = ("best_classifier", "bound")  # in data
# The column `significant`.
SIGNS = {"higher": "+", "lower": "-"}  # after the role: `host+` is better than the host
SIGNIFICANT = {"higher": "yes", "lower": "yes", "not significant": "no", "not tested": "not tested"}


# ---------------------------------------------------------------- columns


@dataclass(frozen=True)
class Column:
    """A column with the mean of a metric over the runs of a row."""

    key: str  # its name
    metric: str  # of the trials
    note: str = ""  # sentence for the caption of a table with the column
    # table: the printed one and those of screen and report, which leave out empty columns;
    # untested: the same, for rows without test images; data: JSON, CSV and `airsweep.table`.
    on: tuple[str, ...] = ("table", "data")
    show: Callable[[float | None], str] = format_percent  # not in data


COLUMNS = (
    Column(
        "agreement",
        AGREEMENT,
        note="Agreement: share in % of the unlabelled images to which text and auxiliary "
        "classifier give the same class; both can be wrong.",
        on=("untested",),
    ),
    *(
        Column(
            f"information {name}",
            f"{MUTUAL_INFORMATION}_{name}",
            note="Information: mutual information in nats of a classifier, high where its "
            "predictions are sure and cover the classes evenly, right or wrong.",
            on=("untested",),
            show=lambda value: "" if value is None else f"{value:.3f}",
        )
        for name in TESTED
    ),
    Column(
        "text",
        "test/accuracy_text",
        "Accuracy: text classifier; where no prompt is learned, that of the column fused.",
    ),
    Column("fused", "test/accuracy_fused", "Fused: with the auxiliary classifier."),
    Column("auxiliary", "test/accuracy_auxiliary", "Auxiliary: that one alone."),
    Column(
        "pseudo-labels",
        "pseudo/accuracy",
        "Pseudo-labels: accuracy of the last pseudo-labels.",
        on=("table",),
    ),
    Column("lora_labels", "pseudo/accuracy_lora", on=("data",)),
)
# Columns in the order in which they are left out of a table that is wider.
LAST = ("95 %", "fused", "n")
SPARE = (
    "test images",
    *(c.key for c in reversed(COLUMNS) if "table" in c.on and c.key not in ("text", *LAST)),
    *LAST,
)


def _means(row: Row, output: str) -> dict[str, float | None]:
    return {c.key: row.average(c.metric) for c in COLUMNS if output in c.on}


def _texts(row: Row, output: str) -> dict[str, str]:
    return {c.key: c.show(row.average(c.metric)) for c in COLUMNS if output in c.on}


def column_notes(header: Collection[str]) -> list[str]:
    """Sentences for a caption on the columns of a table."""
    notes = {c.key: c.note for c in COLUMNS if c.note and c.key in header}
    if "fused" in notes and "text" not in notes:
        notes["fused"] = f"Accuracy: text classifier. {notes['fused']}"
    return [*dict.fromkeys(notes.values())]


# ---------------------------------------------------------------- one line per row


def table(results: Results, format: str, columns: str = "all") -> str:
    """The table, without a newline at the end.

    Args:
        format: md, csv or json.
        columns: `all`, or `fit`: in Markdown, a table of rows with those columns that fit `WIDTH`
            characters, and one of differences.
    """
    match format:
        case "json":
            return json.dumps(as_json(results), indent=2, allow_nan=False)
        case "csv":
            return _csv(results)
        case _ if not results.rows:
            return f"{EMPTY.capitalize()}."
        case _ if columns == "fit":
            layouts = [*_fitted(results), *points_layouts(results)]
        case _:
            values = [c for of_key in results.value_comparisons.values() for c in of_key]
            layouts = [
                table_layout(results),
                *difference_layouts(results, values),
                *points_layouts(results),
            ]
    return "\n\n".join(map(markdown, layouts))


def as_json(results: Results) -> list[dict[str, object]]:
    """The rows for `table --format json`. New versions may add keys but never remove any."""
    return [
        row.as_json()
        | _means(row, "data")
        | {
            "mutual_information": {
                name: value
                for name in TESTED
                if (value := row.average(f"{MUTUAL_INFORMATION}_{name}")) is not None
            },
            "agreement": row.average(AGREEMENT),
            **_marks(results, row),
            "chance": results.chance(row),
            "comparisons": [c.as_json() for c in results.all_comparisons if c.row is row],
            "collapsed": [vars(run) for run in row.collapsed_runs],
        }
        | ({} if row.choice is None else {"points": [*map(_point, results.best_points(row))]})
        for row in results.rows
    ]


def _point(row: Row) -> dict[str, Any]:
    """One of the best points of a searched cell, or the default one, for JSON."""
    about = {"point": row.point, "settings": row.settings, "objective": row.first.objective}
    return about | {name: row.as_json()[name] for name in ("mean", "low", "high", "n")}


def _marks(results: Results, row: Row) -> dict[str, Any]:
    """The name of the task's best classifier, if it is one of this row; whether it is a bound."""
    best = results.best_of(row)
    return {"best_classifier": best and best.classifier, "bound": is_bound(row.method)}


def _csv(results: Results) -> str:
    """All numbers, in cells and below names that spreadsheets do not evaluate."""
    from pandas import DataFrame

    frame = rows_frame(results, "settings.", _csv_setting)
    frame["bound"] = [format_value(bound) for bound in frame["bound"]]
    if not results.tested:
        free = [_texts(row, "untested") for row in results.rows]
        for name in dict.fromkeys(chain.from_iterable(free)):
            frame[name] = [cells.get(name, "") for cells in free]
    frame["chance"] = [results.chance(row) for row in results.rows]
    marks = [
        [role + SIGNS[c.verdict] for role, c in of_row.items() if c.is_significant]
        for of_row in map(results.comparisons_of, results.rows)
    ]
    frame["told_from"] = [*map(" ".join, marks)]
    frame["collapsed"] = [len(row.collapsed_runs) for row in results.rows]
    # As objects: otherwise a column of integers with a missing value would become one of floats.
    cells = [[csv_cell(cell) for cell in line] for line in frame.astype(object).to_numpy()]
    safe = DataFrame(cells, columns=[csv_cell(name) for name in frame], dtype=object)
    text: str = safe.to_csv(index=False, lineterminator="\n")
    return text.rstrip("\n")


def rows_frame(
    results: Results, prefix: str = "", setting: Callable[[Any], Any] = lambda value: value
) -> DataFrame:
    """The rows, fractions in [0, 1]: settings as columns, then n, n_test, mean, std, low, high,
    what the interval is, and the columns on `data`.

    Args:
        prefix: of the columns of settings.
        setting: how a value of a setting is shown.
    """
    from pandas import DataFrame

    keys = dict.fromkeys(prefix + key for row in results.rows for key in row.settings)
    lines = [
        row.as_json()
        | _means(row, "data")
        | _marks(results, row)
        | {prefix + key: setting(value) for key, value in row.settings.items()}
        for row in results.rows
    ]
    at = FIELDS.index("settings")
    of_search = [key for key in ("point", "chosen_by") if any(key in o for o in lines)]
    measured = [column.key for column in COLUMNS if "data" in column.on]
    columns = [*FIELDS[:at], *keys, *FIELDS[at + 1 :], *measured, *MARKED, *of_search]
    return DataFrame(lines, columns=columns, dtype=object)


def gains_frame(results: Results) -> DataFrame:
    """`rows_frame` with the gains over host and control, for `airsweep.table`.

    For each role: the method of the baseline, as `host`; `host_gain`, `host_low` and `host_high`,
    fractions; `host_p`, the p value corrected within the question. NaN without this baseline;
    interval and p value also where the gain is not tested. `marks` has the marks of significant
    gains as in printed tables.
    """
    frame = rows_frame(results).infer_objects()
    by_row = [results.comparisons_of(row) for row in results.rows]
    for role in MARKS:
        found = [comparisons.get(role) for comparisons in by_row]
        frame[role] = [c and c.baseline.method for c in found]
        frame[f"{role}_gain"] = [c.difference.mean if c else math.nan for c in found]
        tested = [c if c and c.is_tested else None for c in found]
        frame[f"{role}_low"] = [c.difference.low if c else math.nan for c in tested]
        frame[f"{role}_high"] = [c.difference.high if c else math.nan for c in tested]
        frame[f"{role}_p"] = [c.p_corrected if c else math.nan for c in tested]
    frame["marks"] = ["".join(c.mark for c in comparisons.values()) for comparisons in by_row]
    return frame


def _csv_setting(value: Any) -> Any:
    """A setting with all its digits; true, false and null as in sweep files."""
    return format_value(value) if value is None or isinstance(value, bool) else value


def _fitted(results: Results) -> Iterator[Layout]:
    """The rows without the columns that do not fit, and the differences."""
    gains = [f"gain over {role}" for role in MARKS]
    marked = {best.classifier for best in results.best_classifiers.values()}
    for dropped in range(len(SPARE) + 1):
        left_out = [name for name in SPARE[:dropped] if name not in marked]
        layout = table_layout(results, [*gains, *left_out])
        if max(map(len, grid(layout).splitlines())) <= WIDTH:
            break
    shown = table_lines(results)[0]
    # The caption has the number of test images.
    if absent := [name for name in left_out if name in shown and name != "test images"]:
        note = f"Not shown: {', '.join(absent)}; --columns all shows them."
        layout = replace(layout, notes=[*layout.notes, note])
    yield layout
    yield from difference_layouts(results, results.all_comparisons)


def difference_layouts(results: Results, comparisons: Sequence[Comparison]) -> Iterator[Layout]:
    """One table with a line per comparison; none without comparisons."""
    if comparisons:
        notes = [*significance_notes(comparisons, marks=False), *comparison_notes(comparisons)]
        yield Layout(lines=_comparison_lines(results, comparisons), notes=notes)


def points_layouts(results: Results) -> Iterator[Layout]:
    """Of a search, the best points of each cell by the objective, and the default point."""
    searched = [(row, row.choice.objective) for row in results.rows if row.choice is not None]
    lines = [
        {
            **_task_cells(results, point),
            "method": point.method if len(searched) > 1 else "",
            "point": str(point.point or point.first.first_point.replace("setting", "").strip()),
            **{key: format_value(point.settings.get(key, "")) for key in results.varied_settings},
            objective.replace("_", " "): _objective_text(objective, point.first.objective),
            "accuracy": mean_std(point),
        }
        for row, objective in searched
        for point in results.best_points(row)
    ]
    if lines:
        yield Layout(
            lines=without(lines, ()),
            caption=[
                "The best points of the search by its objective, which reads no test label; "
                "`airsweep.results` in Python has all."
            ],
            notes=search_answers(results),
        )


def _objective_text(objective: str, value: float | None) -> str:
    """An accuracy in percent, mutual information in nats."""
    if value is None or objective.endswith("accuracy"):
        return format_percent(value)
    return f"{value:.3f}"


def table_layout(results: Results, left_out: Sequence[str] = ()) -> Layout:
    """The rows, with all columns but those that are left out."""
    lines = table_lines(results, left_out)
    caption = [*_caption(results, [*lines[0]])]
    if not left_out:
        caption += [
            *significance_notes(results.comparisons),
            *comparison_notes(results.comparisons),
        ]
    return Layout(lines=lines, caption=caption, notes=collapse_notes(results))


def _task_cells(results: Results, row: Row) -> dict[str, str]:
    """The parts of a row's task in which the tasks of the table differ."""
    parts = zip(TASK, row.task, zip(*results.tasks, strict=True), strict=True)
    return {name: value for name, value, values in parts if len({*values}) > 1}


def table_lines(results: Results, left_out: Sequence[str] = ()) -> list[dict[str, str]]:
    """One line of cells per row, without empty columns and those that are left out."""
    lines = [
        {
            **_task_cells(results, row),
            "method": method_text(row.method),
            **{key: format_value(row.settings.get(key, "")) for key in results.varied_settings},
            "accuracy": mean_std(row),
            "95 %": format_interval(row.low, row.high) if row.is_tested else "",
            **({} if row.is_tested else _texts(row, "untested")),
            "n": str(row.n),
            "test images": str(row.n_test or ""),
            **_texts(row, "table"),
            **{f"gain over {role}": "" for role in MARKS},
            **{
                f"gain over {role}": f"{c.text} {c.baseline.method}{c.mark}"
                for role, c in results.comparisons_of(row).items()
            },
        }
        for row in results.rows
    ]
    # The accuracy of a row is that of the text classifier, unless no prompt is learned.
    pairs = zip(results.rows, lines, strict=True)
    if all(line["text"] in ("", format_percent(row.mean)) for row, line in pairs):
        lines = [line | {"text": ""} for line in lines]
    for row, line in zip(results.rows, lines, strict=True):
        if best := results.best_of(row):
            columns = (best.classifier, "accuracy", f"information {best.classifier}", "method")
            own = next(name for name in columns if line.get(name))
            line[own] = BEST + line[own]
    return without(lines, left_out)


def _comparison_lines(results: Results, comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """One line of cells per comparison, without empty columns."""
    keys = [
        key
        for key in results.varied_settings
        if len({repr(c.row.settings.get(key)) for c in comparisons if c.role != key}) > 1
    ]
    points = "points, 95 %" if any(c.is_tested for c in comparisons) else "points"
    lines = []
    for c in comparisons:
        line = {
            "task": results.task_text(c.row.task),
            "difference": c.name + BOUND * is_bound(c.row.method),
            **{
                key: "" if key == c.role else format_value(c.row.settings.get(key, ""))
                for key in keys
            },
            points: c.text,
            "n": str(c.difference.n),
            "significant": SIGNIFICANT[c.verdict],
        }
        if c.is_tested:
            line |= {
                "p corrected": _p_value(c.p_corrected),
                "detectable": format_percent(c.detectable),
            }
        lines.append(line)
    return without(lines, ())


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def _caption(results: Results, header: Sequence[str]) -> Iterator[str]:
    yield from at_chance_notes(results)
    tasks = "; ".join(map(task_text, results.tasks))
    if results.tested:
        yield f"Test accuracy in %, mean ± standard deviation over n runs ({tasks})."
    else:
        yield f"Means over n runs ({tasks})."
    if best := best_texts(results):
        yield f"Best classifier (*): {'; '.join(best)}."
    yield from protocol_notes(results)
    if results.tested and "test images" not in header:
        counts = [row.n_test for row in results.tested]
        ends = dict.fromkeys(f"{count:,}" for count in (min(counts), max(counts)))
        yield f"{' to '.join(ends)} test images per run."
    yield from column_notes(header)
    if any(name.startswith("gain") for name in header):
        yield "Gains in points, with 95 % interval if tested, paired by image and run."
