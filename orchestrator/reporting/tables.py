"""Results as tables: Markdown, LaTeX, CSV and JSON, with the protocol in the caption.

`table` has one line per row with all its numbers. `pivot` arranges rows as papers do: some keys
down, some across, one number in each cell. `pivot` never averages over settings: it refuses an
arrangement in which two rows share a cell.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator.formatting import format_interval, format_percent, format_value
from orchestrator.reporting._layouts import Layout, csv_text, drop_empty_columns, markdown, render
from orchestrator.reporting.rows import (
    EMPTY,
    FIELDS,
    MARKS,
    MUTUAL_INFORMATION,
    Comparison,
    Results,
    Role,
    Row,
    choice_notes,
    collapse_notes,
    is_bound,
    mean_std,
    protocol_notes,
    significance_notes,
    splits_and_seeds,
    task_text,
    untested_notes,
)
from orchestrator.spec.marked_yaml import allowed_choices, suggestion

if TYPE_CHECKING:
    from pandas import DataFrame

FORMATS = ("md", "csv", "json", "latex")
COLUMN_SETS = ("fit", "all")
WIDTH = 100  # characters of a line
# Columns in the order in which they are left out of a table that is wider.
SPARE = ("n_test", "pseudo-labels", "auxiliary", "95 %", "fused", "n")
TASK = ("dataset", "paradigm", "modality")  # columns; left out if all rows have the same value
TESTED = ("text", "fused", "auxiliary")  # classifiers that a trial tests on the same images
AGREEMENT = "objective/agreement_text"
ACCURACY = "accuracy"  # the metric of the rows, with interval and marks
# The column `significant`.
SIGNIFICANT = {"higher": "yes", "lower": "yes", "not significant": "no", "not tested": "not tested"}


# ---------------------------------------------------------------- columns


@dataclass(frozen=True)
class Column:
    """A column with the mean of a metric over the runs of a row."""

    key: str  # its name, also for `--metric`
    metric: str  # of the trials
    description: str = ""  # of a table of the metric alone; empty: not for `--metric`
    note: str = ""  # sentence for the caption of a table with the column
    # table: the printed one and those of screen and report, which leave out empty columns;
    # untested: the same, for rows without test images; data: JSON, CSV and `airsweep.table`.
    on: tuple[str, ...] = ("table", "data")
    show: Callable[[float | None], str] = format_percent  # not in data


COLUMNS = (
    Column(ACCURACY, ACCURACY, "Test accuracy in %", on=()),
    Column(
        "agreement",
        AGREEMENT,
        note="Agreement: share in % of the unlabelled images to which text and auxiliary "
        "classifier give the same class.",
        on=("untested",),
    ),
    *(
        Column(
            f"MI {name}",
            f"{MUTUAL_INFORMATION}_{name}",
            note="MI: mutual information in nats of a classifier, high where its predictions are "
            "sure and cover the classes evenly; no accuracy.",
            on=("untested",),
            show=lambda value: "" if value is None else f"{value:.3f}",
        )
        for name in TESTED
    ),
    Column(
        "text",
        "test/accuracy_text",
        "Test accuracy in % of the text classifier",
        "Accuracy: text classifier; where no prompt is learned, that of the column fused.",
    ),
    Column(
        "fused",
        "test/accuracy_fused",
        "Test accuracy in % of text and auxiliary classifier combined",
        "Fused: with the auxiliary classifier.",
    ),
    Column(
        "auxiliary",
        "test/accuracy_auxiliary",
        "Test accuracy in % of the auxiliary classifier",
        "Auxiliary: that one alone.",
    ),
    Column("seen", "test/seen", "Test accuracy in % on seen classes", on=()),
    Column("unseen", "test/unseen", "Test accuracy in % on unseen classes", on=()),
    Column(
        "pseudo-labels",
        "pseudo/accuracy",
        "Accuracy in % of the last pseudo-labels",
        "Pseudo-labels: accuracy of the last pseudo-labels.",
        on=("table",),
    ),
    Column(
        "coverage",
        "pseudo/coverage",
        "Share in % of the pool that the last pseudo-labels cover",
        on=(),
    ),
    Column("seconds", "time/train_s", "Seconds of training", on=()),
)
METRICS = {column.key: column for column in COLUMNS if column.description}  # for `--metric`
DESCRIPTIONS = {column.metric: column.description for column in METRICS.values()}


def _means(results: Results, row: Row, output: str) -> dict[str, float | None]:
    return {c.key: results.mean(row, c.metric) for c in COLUMNS if output in c.on}


def _texts(results: Results, row: Row, output: str) -> dict[str, str]:
    return {c.key: c.show(results.mean(row, c.metric)) for c in COLUMNS if output in c.on}


def column_notes(header: Collection[str]) -> list[str]:
    """Sentences for a caption on the columns of a table."""
    notes = {c.key: c.note for c in COLUMNS if c.note and c.key in header}
    if "fused" in notes and "text" not in notes:
        notes["fused"] = f"Accuracy: text classifier. {notes['fused']}"
    return [*dict.fromkeys(notes.values())]


# ---------------------------------------------------------------- one line per row


def table(results: Results, format: str, columns: str = "all") -> str:
    """The table in one of `FORMATS`, without a newline at the end.

    Args:
        columns: `all`, or `fit`: in Markdown, a table of rows with those columns that fit `WIDTH`
            characters, and one of differences.
    """
    match format:
        case "json":
            return json.dumps(as_json(results), indent=2, allow_nan=False)
        case "csv":
            return _csv(results)
        case _ if not results.rows:
            return f"% {EMPTY}" if format == "latex" else f"{EMPTY.capitalize()}."
        case "md" if columns == "fit":
            return "\n\n".join(map(markdown, _fitted(results)))
        case _:
            return render(table_layout(results), format)


def as_json(results: Results) -> list[dict[str, object]]:
    """The rows for `table --format json`. New versions may add keys but never remove any."""
    return [
        row.as_json()
        | _means(results, row, "data")
        | {
            "mutual_information": {
                name: value
                for name in TESTED
                if (value := results.mean(row, f"{MUTUAL_INFORMATION}_{name}")) is not None
            },
            "agreement": results.mean(row, AGREEMENT),
            "chance": results.chance(row),
            "comparisons": [c.as_json() for c in results.comparisons_of(row).values()],
            "collapsed": [vars(run) for run in results.collapsed_runs(row)],
        }
        for row in results.rows
    ]


def _csv(results: Results) -> str:
    frame = rows_frame(results, "settings.", _csv_setting)
    if not results.tested:
        free = [_texts(results, row, "untested") for row in results.rows]
        for name in dict.fromkeys(name for cells in free for name in cells):
            frame[name] = [cells.get(name, "") for cells in free]
    frame["chance"] = [results.chance(row) for row in results.rows]
    frame["told_from"] = [
        " ".join(_ascii_marks(results.comparisons_of(row))) for row in results.rows
    ]
    frame["collapsed"] = [len(results.collapsed_runs(row)) for row in results.rows]
    return csv_text(frame)


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
        | _means(results, row, "data")
        | {prefix + key: setting(value) for key, value in row.settings.items()}
        for row in results.rows
    ]
    at = FIELDS.index("settings")
    of_search = [key for key in ("point", "chosen_by", "pruned") if any(key in o for o in lines)]
    measured = [column.key for column in COLUMNS if "data" in column.on]
    columns = [*FIELDS[:at], *keys, *FIELDS[at + 1 :], *measured, *of_search]
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
    for dropped in range(len(SPARE) + 1):
        left_out = SPARE[:dropped]
        layout = table_layout(results, [*gains, *left_out])
        if max(map(len, markdown(replace(layout, caption=(), notes=())).splitlines())) <= WIDTH:
            break
    shown = table_lines(results)[0]
    if absent := [name for name in left_out if name in shown and name != "n_test"]:  # in a sentence
        note = f"Not shown: {', '.join(absent)}; --columns all shows them."
        layout = replace(layout, notes=[*layout.notes, note])
    yield layout
    if lines := comparison_lines(results):
        from pandas import DataFrame

        frame = DataFrame(lines).drop(columns=["compared with", "n_test", "p"], errors="ignore")
        yield Layout(
            frame=frame,
            notes=[
                *significance_notes(results.comparisons, marks=False),
                *untested_notes(results.comparisons),
            ],
        )


def table_layout(results: Results, left_out: Sequence[str] = ()) -> Layout:
    """The rows, with all columns but those that are left out."""
    from pandas import DataFrame

    frame = DataFrame(table_lines(results)).drop(columns=[*left_out], errors="ignore")
    highest = {task: results.best(task).mean for task in results.tasks}
    best = [i for i, row in enumerate(results.rows) if row.mean == highest[row.task]]
    return Layout(
        frame=frame,
        bold=frozenset((i, frame.columns.get_loc("accuracy")) for i in best),
        caption=[
            *_caption(results, list(frame.columns)),
            *(significance_notes(results.comparisons) if not left_out else []),
            *(untested_notes(results.comparisons) if not left_out else []),
        ],
        notes=[*choice_notes(results.rows), *collapse_notes(results)],
    )


def table_lines(results: Results) -> list[dict[str, str]]:
    """One line of cells per row, without empty columns."""
    varying = [i for i, values in enumerate(zip(*results.tasks, strict=True)) if len({*values}) > 1]
    lines = [
        {
            **{TASK[i]: row.task[i] for i in varying},
            "method": row.method,
            **{key: format_value(row.settings.get(key, "")) for key in results.varied_settings},
            "accuracy": mean_std(row),
            "95 %": format_interval(row.low, row.high) if row.is_tested else "",
            **({} if row.is_tested else _texts(results, row, "untested")),
            "n": str(row.n),
            "n_test": str(row.n_test or ""),
            **_texts(results, row, "table"),
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
    return drop_empty_columns(lines)


def comparison_lines(results: Results) -> list[dict[str, str]]:
    """One line of cells per comparison, without empty columns."""
    keys = [
        key
        for key in results.varied_settings
        if len({repr(c.row.settings.get(key)) for c in results.comparisons}) > 1
    ]
    return drop_empty_columns(
        [
            {
                "task": task_text(c.row.task) if len(results.tasks) > 1 else "",
                "difference": c.name,
                "compared with": c.role,
                **{key: format_value(c.row.settings.get(key, "")) for key in keys},
                "points, 95 %": c.text,
                "n": str(c.difference.n),
                "n_test": str(c.difference.n_test),
                "significant": SIGNIFICANT[c.verdict],
                **(_test_cells(c) if c.is_tested else {}),
            }
            for c in results.comparisons
        ]
    )


def _test_cells(c: Comparison) -> dict[str, str]:
    return {
        "p": _p_value(c.difference.p),
        "p corrected": _p_value(c.p_corrected),
        "detectable": format_percent(c.detectable),
    }


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def _caption(results: Results, header: Sequence[str]) -> Iterator[str]:
    tasks = "; ".join(f"{d}, {p}/{m}" for d, p, m in results.tasks)
    if results.tested:
        yield f"Test accuracy in %, mean ± standard deviation over n runs ({tasks})."
    else:
        yield f"Means over n runs ({tasks})."
    yield from protocol_notes(results)
    if "n_test" in header:
        yield "n_test: test images of one run."
    elif results.tested:
        yield f"{_range(_counts(row.n_test for row in results.tested))} test images per run."
    yield from column_notes(header)
    if any(name.startswith("gain") for name in header):
        yield "Gains in points, with 95 % interval if tested, paired by image and run."


def _ascii_marks(comparisons: Mapping[Role, Comparison]) -> list[str]:
    return [c.ascii_mark for c in comparisons.values() if c.ascii_mark]


# ---------------------------------------------------------------- keys down and across

NOT_APPLICABLE = "\u2013"  # a setting that the method does not have
# Prefixes of metrics that are fractions and shown in %.
FRACTIONS = (
    *(ACCURACY, "test/", "pseudo/", "pool/"),
    *("objective/validation_accuracy", "objective/agreement"),
)


@dataclass(frozen=True, kw_only=True)
class Pivot:
    """A table with keys down and across."""

    metric: str
    down: Sequence[str]  # keys
    across: Sequence[str]
    cells: DataFrame  # one line per cell: all keys, mean, std, n, text, best, row, ...
    caption: Sequence[str]
    notes: Sequence[str]


def pivot(
    results: Results,
    *,
    down: Sequence[str] | None = None,
    across: Sequence[str] | None = None,
    metric: str = ACCURACY,
) -> Pivot:
    """Arrange the rows of a table by keys down and across.

    Args:
        down: keys of the lines; None: method and all other keys that vary and are not across.
        across: keys of the columns; None: dataset.

    Raises:
        ValueError: a key or metric does not exist, or two rows share a cell.
    """
    from pandas import Categorical, DataFrame

    name = _metric(metric, results)
    keys = [*TASK, "method", *results.varied_settings]
    cells = DataFrame([{key: _value(row, key) for key in keys} for row in results.rows])
    across = _checked("--cols", ["dataset"] if across is None else across, keys)
    if down is None:
        rest = [key for key in keys if key != "method" and cells[key].nunique() > 1]
        down = [key for key in ("method", *rest) if key not in across]
    down = _checked("--rows", down, keys)
    if both := [key for key in down if key in across]:
        raise ValueError(f"--rows and --cols both contain {both[0]}; allowed: in one of them")
    _refuse_shared_cells(cells, [*down, *across])

    for key in keys:  # sorted by first appearance
        cells[key] = Categorical(cells[key], cells[key].unique())
    comparisons = [results.comparisons_of(row) if name == ACCURACY else {} for row in results.rows]
    numbers = [_numbers(row, results, name) for row in results.rows]
    cells[["mean", "std", "n"]] = numbers
    cells["row"], cells["comparisons"] = results.rows, comparisons
    cells["told_from"] = [" ".join(_ascii_marks(by_role)) for by_role in comparisons]
    cells["text"] = [
        _cell_text(mean, std, name) + "".join(c.mark for c in by_role.values())
        for (mean, std, _), by_role in zip(numbers, comparisons, strict=True)
    ]
    cells = cells[cells["n"] > 0].astype({"n": int})
    # The best cell of each column and task, if there are at least two to compare.
    methods = cells[[not is_bound(row.method) for row in cells["row"]]]
    means = methods.groupby([*dict.fromkeys([*across, *TASK])], observed=True)["mean"]
    best = (means.transform("size") > 1) & (methods["mean"] == means.transform("max"))
    best = best.reindex(cells.index, fill_value=False)
    return Pivot(
        metric=name,
        down=down,
        across=across,
        cells=cells.assign(best=best & name.startswith(FRACTIONS)),
        caption=_pivot_caption(results, name),
        notes=[*choice_notes(results.rows), *collapse_notes(results)],
    )


def _checked(option: str, keys: Sequence[str], allowed: Sequence[str]) -> Sequence[str]:
    if not keys:
        raise ValueError(f"{option} is empty; allowed: {', '.join(allowed)}")
    for key in keys:
        if key not in allowed:
            raise ValueError(
                f"{option} {key}: the sweep varies no such key; {allowed_choices(key, allowed)}"
            )
        if list(keys).count(key) > 1:
            raise ValueError(f"{option} contains {key} twice; allowed: once")
    return keys


def _metric(name: str, results: Results) -> str:
    """The name of a metric in the records, from that name or its short name."""
    recorded = dict.fromkeys(key for trial in results.trials for key in trial.metrics)
    metric = METRICS[name].metric if name in METRICS else name
    if results.tested:
        recorded[ACCURACY] = None
    if metric in recorded:
        return metric
    short = [key for key, column in METRICS.items() if column.metric in recorded]
    options = [*short, *(key for key in recorded if key not in DESCRIPTIONS)]
    raise ValueError(
        f"--metric {name}: no trial of this sweep has it; {suggestion(name, options)}"
        f"available: {', '.join(options)}"
    )


def _value(row: Row, key: str) -> str:
    if key in (*TASK, "method"):
        return str(getattr(row, key))
    return format_value(row.settings[key]) if key in row.settings else NOT_APPLICABLE


def _refuse_shared_cells(cells: DataFrame, used: Sequence[str]) -> None:
    for values, group in cells.groupby(list(used), sort=False):
        if len(group) > 1:
            differ = [key for key in cells if key not in used and group[key].nunique() > 1]
            raise ValueError(
                f"{len(group)} rows share the cell of {', '.join(values)}: they differ in "
                f"{', '.join(differ) or 'no key'}; add it to --rows or --cols"
            )


def _numbers(row: Row, results: Results, metric: str) -> tuple[float, float, int]:
    """Mean, standard deviation and number of runs of a metric; nan if the row has no value."""
    if metric == ACCURACY:
        n = row.n if row.is_tested else 0
        return row.mean, math.nan if row.std is None else row.std, n
    values = results.values(row, metric)
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan, len(values)


def _pivot_caption(results: Results, metric: str) -> list[str]:
    in_percent = metric.startswith(FRACTIONS)
    description = DESCRIPTIONS.get(metric, f"{metric}{' in %' if in_percent else ''}")
    task = f" ({task_text(results.tasks[0])})" if len(results.tasks) == 1 else ""
    ns, tests = (_counts(of) for of in zip(*((r.n, r.n_test) for r in results.rows), strict=True))
    caption = [
        f"{description}, mean ± standard deviation over runs{task}; n = {_range(ns)}, "
        f"{_range(tests)} test images per run."
    ]
    if in_percent:
        caption.append("Bold: best of its column in the same dataset, paradigm and modality.")
    if metric == ACCURACY:
        comparisons = results.comparisons
        notes = [
            *protocol_notes(results),
            *significance_notes(comparisons),
            *untested_notes(comparisons),
        ]
    else:
        notes = [
            splits_and_seeds(results.rows),
            "No difference is tested in a table of this metric.",
        ]
    return [*caption, *notes]


def _counts(numbers: Iterable[int]) -> list[str]:
    return [f"{number:,}" for number in sorted({*numbers})]


def _range(numbers: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys([numbers[0], numbers[-1]]))


def pivot_text(pivot: Pivot, format: str) -> str:
    """A pivot in one of `FORMATS`, without a newline at the end."""
    match format:
        case "json":
            return json.dumps(_pivot_json(pivot), indent=2, allow_nan=False)
        case "csv":
            return _pivot_csv(pivot)
        case _:
            return render(_pivot_layout(pivot), format)


def _wide(pivot: Pivot, column: str) -> DataFrame:
    """A column of the cells, with the keys down as index and the keys across as columns."""
    wide = pivot.cells.pivot(index=[*pivot.down], columns=[*pivot.across], values=column)
    return wide.sort_index(axis=0).sort_index(axis=1)


def _names(keys: Any) -> list[list[str]]:
    """The key values of an index, one list per line or column."""
    names: list[list[str]] = keys.to_frame().astype(str).to_numpy().tolist()
    return names


def _pivot_layout(pivot: Pivot) -> Layout:
    from pandas import DataFrame, MultiIndex

    wide, width = _wide(pivot, "text"), len(pivot.down)
    heads = _names(wide.columns)
    if len(pivot.across) == 1 and pivot.across[0] not in (*TASK, "method"):
        heads = [[pivot.across[0], *head] for head in heads]
    heads = [*([""] * (len(heads[0]) - 1) + [key] for key in pivot.down), *heads]
    lines = zip(_names(wide.index), wide.fillna("").to_numpy().tolist(), strict=True)
    best = _wide(pivot, "best").eq(True).to_numpy()
    return Layout(
        frame=DataFrame(
            [[*keys, *cells] for keys, cells in lines],
            columns=MultiIndex.from_tuples(heads) if len(heads[0]) > 1 else [n for [n] in heads],
        ),
        bold=frozenset((i, width + j) for i, j in zip(*best.nonzero(), strict=True)),
        caption=pivot.caption,
        notes=pivot.notes,
    )


def _cell_text(mean: float, std: float, metric: str) -> str:
    if metric.startswith(FRACTIONS):
        return format_percent(mean) + ("" if math.isnan(std) else f" ± {format_percent(std)}")
    return f"{mean:.4g}" + ("" if math.isnan(std) else f" ± {std:.2g}")


def _pivot_csv(pivot: Pivot) -> str:
    from pandas import DataFrame

    values = ["mean", "std", *(["told_from"] if pivot.metric == ACCURACY else [])]
    wide = {value: _wide(pivot, value) for value in values}
    columns = {
        " ".join([*name, *([] if value == "mean" else [value])]): wide[value].iloc[:, i]
        for i, name in enumerate(_names(wide["mean"].columns))
        for value in values
    }
    return csv_text(DataFrame(columns).reset_index())


def _pivot_json(pivot: Pivot) -> dict[str, Any]:
    cells = []
    for cell in pivot.cells.to_dict("records"):
        row: Row = cell["row"]
        std = None if math.isnan(cell["std"]) else cell["std"]
        numbers = {"mean": cell["mean"], "std": std, "n": cell["n"], "n_test": row.n_test}
        if pivot.metric == ACCURACY:
            numbers |= {
                "low": row.low,
                "high": row.high,
                "interval": row.interval,
                "told_from": _ascii_marks(cell["comparisons"]),
                "comparisons": [c.as_json() for c in cell["comparisons"].values()],
            }
        keys = {key: cell[key] for key in (*pivot.down, *pivot.across)}
        cells.append({**keys, **numbers, "best": cell["best"]})
    return {
        "metric": pivot.metric,
        "rows": list(pivot.down),
        "cols": list(pivot.across),
        "caption": [*pivot.caption, *pivot.notes],
        "cells": cells,
    }
