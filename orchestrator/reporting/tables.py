"""Results as tables: Markdown, LaTeX, CSV and JSON, with the protocol in the caption.

`table` has a line for each row and a column for everything. `pivot` arranges rows as a paper does:
some keys down, some across, one number in each cell. Two settings never share a cell: nothing is
averaged that was not asked for.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.formatting import percent, shown
from orchestrator.reporting._layouts import Layout, csv_text, rendered, without_empty
from orchestrator.reporting.rows import (
    COLUMNS,
    EMPTY,
    MARKS,
    Comparison,
    Results,
    Role,
    Row,
    choice_notes,
    collapse_notes,
    mark_notes,
    mean_std,
    protocol_notes,
    signed_interval,
    splits_and_seeds,
    world_text,
)
from orchestrator.spec.marked_yaml import allowed_choices, suggestion

if TYPE_CHECKING:
    from pandas import DataFrame

FORMATS = ("md", "csv", "json", "latex")
WORLD = ("dataset", "paradigm", "modality")  # columns that are left out where all rows share them


# ---------------------------------------------------------------- a line for each row


def table(results: Results, format: str) -> str:
    """The rows as text, without a newline at the end."""
    match format:
        case "json":
            return json.dumps(as_json(results), indent=2, allow_nan=False)
        case "csv":
            return _csv(results)
        case _ if not results.rows:
            return f"% {EMPTY}" if format == "latex" else f"{EMPTY.capitalize()}."
        case _:
            return rendered(laid_out(results), format)


def as_json(results: Results) -> list[dict[str, object]]:
    """The contract of `table --format json`: keys are added, none is removed."""
    return [
        row.as_json()
        | {
            "comparisons": [one.as_json() for one in results.gains(row).values()],
            "collapsed": [vars(one) for one in results.collapsed(row)],
        }
        for row in results.rows
    ]


def _csv(results: Results) -> str:
    frame = rows_frame(results.rows, "settings.", _in_full)
    frame["told_from"] = [" ".join(_significant(results.gains(row))) for row in results.rows]
    frame["collapsed"] = [len(results.collapsed(row)) for row in results.rows]
    return csv_text(frame)


def rows_frame(
    rows: Sequence[Row], prefix: str = "", setting: Callable[[Any], Any] = lambda value: value
) -> DataFrame:
    """The rows, fractions in [0, 1]: settings as columns, then n, n_test, mean, std, low, high and
    what the interval is.

    Args:
        prefix: of the columns of settings.
        setting: how a value of a setting is shown.
    """
    from pandas import DataFrame

    keys = dict.fromkeys(prefix + key for row in rows for key in row.settings)
    lines = [
        row.as_json() | {prefix + key: setting(value) for key, value in row.settings.items()}
        for row in rows
    ]
    at = COLUMNS.index("settings")
    of_search = [key for key in ("point", "chosen_by", "pruned") if any(key in o for o in lines)]
    columns = [*COLUMNS[:at], *keys, *COLUMNS[at + 1 :], *of_search]
    return DataFrame(lines, columns=columns, dtype=object)


def _in_full(value: Any) -> Any:
    """A setting with all its digits; true and null as the sweep file writes them."""
    return shown(value) if value is None or isinstance(value, bool) else value


def laid_out(results: Results) -> Layout:
    from pandas import DataFrame

    frame = DataFrame(texts(results))
    tops = {world: results.best(world).mean for world in results.worlds}
    at = frame.columns.get_loc("accuracy")
    best = [i for i, row in enumerate(results.rows) if row.mean == tops[row.world]]
    return Layout(
        frame=frame,
        bold=frozenset((i, at) for i in best),
        caption=[*_caption(results, list(frame.columns)), *mark_notes(results.comparisons)],
        notes=[*choice_notes(results.rows), *collapse_notes(results)],
    )


def texts(results: Results) -> list[dict[str, str]]:
    """A line for each row, without columns that say nothing."""
    lines = []
    where = [at for at, of in enumerate(zip(*results.worlds, strict=True)) if len({*of}) > 1]
    for row in results.rows:
        line = {
            **{WORLD[at]: row.world[at] for at in where},
            "method": row.method,
            **{key: shown(row.settings.get(key, "")) for key in results.varied},
            "accuracy": mean_std(row),
            "95 %": f"[{percent(row.low)}, {percent(row.high)}]",
            "n": str(row.n),
            "n_test": str(row.n_test),
            "fused": percent(results.mean(row, "test/accuracy_fused")),
            "pseudo-labels": percent(results.mean(row, "pseudo/accuracy")),
            **{f"gain over {role}": "" for role in MARKS},
        }
        for role, one in results.gains(row).items():
            gain = f"{signed_interval(one.difference)} {one.other.method}{one.mark}"
            line[f"gain over {role}"] = gain
        lines.append(line)
    return without_empty(lines)


def differences(results: Results) -> list[dict[str, str]]:
    """A line for each comparison, without columns that say nothing."""
    several = len(results.worlds) > 1
    keys = [
        key
        for key in results.varied
        if len({repr(one.row.settings.get(key)) for one in results.comparisons}) > 1
    ]
    return without_empty(
        [
            {
                "where": world_text(one.row.world) if several else "",
                "difference": " - ".join(one.methods),
                "compared with": one.role,
                **{key: shown(one.row.settings.get(key, "")) for key in keys},
                "points, 95 %": signed_interval(one.difference),
                "n": str(one.difference.n),
                "n_test": str(one.difference.n_test),
                "p": _p_value(one.difference.p),
                "p corrected": _p_value(one.p_corrected),
                "significant": one.verdict,
                "images needed": _images_needed(one),
            }
            for one in results.comparisons
        ]
    )


def _images_needed(one: Comparison) -> str:
    number = None if one.significant else one.difference.images_needed
    return "" if number is None else f"{number:,}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def _caption(results: Results, header: Sequence[str]) -> Iterator[str]:
    where = "; ".join(f"{d}, {p}/{m}" for d, p, m in results.worlds)
    yield f"Test accuracy in %, mean ± standard deviation over n runs ({where})."
    yield from protocol_notes(results.rows)
    yield "n_test: test images of one run."
    if "fused" in header:
        yield "Fused: text and auxiliary classifier together."
    if "pseudo-labels" in header:
        yield "Pseudo-labels: share of the last pseudo-labels that is right."
    if any(name.startswith("gain") for name in header):
        yield "Gains in points with their 95 % interval, paired by image and run."


def _significant(gains: Mapping[Role, Comparison]) -> list[str]:
    return [one.word for one in gains.values() if one.significant]


# ---------------------------------------------------------------- keys down and across

NOTHING = "\u2013"  # of a setting that does not apply to a method
ACCURACY = "accuracy"  # what the paradigm is judged by, with interval and marks

# Short names of metrics; any other that the records have can be asked for by its own.
METRICS = {
    ACCURACY: (ACCURACY, "Test accuracy in %"),
    "fused": (
        "test/accuracy_fused",
        "Test accuracy in % of text and auxiliary classifier together",
    ),
    "text": ("test/accuracy_text", "Test accuracy in % of the text classifier"),
    "auxiliary": (
        "test/accuracy_auxiliary",
        "Test accuracy in % of the auxiliary classifier alone",
    ),
    "seen": ("test/seen", "Test accuracy in % on seen classes"),
    "unseen": ("test/unseen", "Test accuracy in % on unseen classes"),
    "pseudo-labels": ("pseudo/accuracy", "Share in % of the last pseudo-labels that is right"),
    "coverage": ("pseudo/coverage", "Share in % of the pool that the last pseudo-labels cover"),
    "seconds": ("time/train_s", "Seconds of training"),
}
WORDS = dict(METRICS.values())
SHARES = (ACCURACY, "test/", "pseudo/", "pool/", "objective/validation_accuracy")  # shown in %


@dataclass(frozen=True, kw_only=True)
class Pivot:
    """A table with keys down and across."""

    metric: str
    down: Sequence[str]  # keys
    across: Sequence[str]
    cells: DataFrame  # one line a cell: all keys, mean, std, n (fractions), text, best, row, ...
    caption: Sequence[str]
    notes: Sequence[str]


def pivot(
    results: Results,
    *,
    down: Sequence[str] | None = None,
    across: Sequence[str] | None = None,
    metric: str = ACCURACY,
) -> Pivot:
    """Arrange rows.

    Args:
        down: keys of the lines; None: method, and what else differs and is not across.
        across: keys of the columns; None: dataset.

    Raises:
        ValueError: a key or a metric that does not exist, or two settings for one cell.
    """
    from pandas import Categorical, DataFrame

    name = _metric(metric, results)
    known = [*WORLD, "method", *results.varied]
    cells = DataFrame([{key: _value(row, key) for key in known} for row in results.rows])
    across = _keys("--cols", ["dataset"] if across is None else across, known)
    if down is None:
        rest = [key for key in known if key != "method" and cells[key].nunique() > 1]
        down = [key for key in ("method", *rest) if key not in across]
    down = _keys("--rows", down, known)
    if twice := [key for key in down if key in across]:
        raise ValueError(f"--rows and --cols both have {twice[0]}; allowed: once")
    _refuse_two(cells, [*down, *across])

    for key in known:  # sorted by first appearance
        cells[key] = Categorical(cells[key], cells[key].unique())
    gains = [results.gains(row) if name == ACCURACY else {} for row in results.rows]
    numbers = [_numbers(row, results, name) for row in results.rows]
    cells[["mean", "std", "n"]] = numbers
    cells["row"], cells["gains"] = results.rows, gains
    cells["told_from"] = [" ".join(_significant(of)) for of in gains]
    cells["text"] = [
        _cell_text(mean, std, name) + "".join(one.mark for one in of.values())
        for (mean, std, _), of in zip(numbers, gains, strict=True)
    ]
    cells = cells[cells["n"] > 0].astype({"n": int})
    # The best of each column; of each world in it, since worlds are not compared. A cell without
    # another to be better than is not the best.
    means = cells.groupby([*dict.fromkeys([*across, *WORLD])], observed=True)["mean"]
    best = (means.transform("size") > 1) & (cells["mean"] == means.transform("max"))
    return Pivot(
        metric=name,
        down=down,
        across=across,
        cells=cells.assign(best=best & name.startswith(SHARES)),
        caption=_pivot_caption(results, name),
        notes=[*choice_notes(results.rows), *collapse_notes(results)],
    )


def _keys(option: str, keys: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    if not keys:
        raise ValueError(f"{option} names nothing; allowed: {', '.join(known)}")
    for key in keys:
        if key not in known:
            raise ValueError(
                f"{option} {key}: the sweep varies no such key; {allowed_choices(key, known)}"
            )
        if list(keys).count(key) > 1:
            raise ValueError(f"{option} has {key} twice; allowed: once")
    return keys


def _metric(name: str, results: Results) -> str:
    there = dict.fromkeys(key for entry in results.entries for key in entry.metrics)
    found, _ = METRICS.get(name, (name, ""))
    if found == ACCURACY or found in there:
        return found
    short = [word for word, (key, _) in METRICS.items() if key in (ACCURACY, *there)]
    options = [*short, *(key for key in there if key not in WORDS)]
    raise ValueError(
        f"--metric {name}: no trial of this sweep has it; there: {', '.join(options)}"
        f"{suggestion(name, options)}"
    )


def _value(row: Row, key: str) -> str:
    if key in (*WORLD, "method"):
        return str(getattr(row, key))
    return shown(row.settings[key]) if key in row.settings else NOTHING


def _refuse_two(cells: DataFrame, used: Sequence[str]) -> None:
    for at, group in cells.groupby(list(used), sort=False):
        if len(group) > 1:
            differ = [key for key in cells if key not in used and group[key].nunique() > 1]
            raise ValueError(
                f"{len(group)} settings share the cell of {', '.join(at)}: they differ in "
                f"{', '.join(differ) or 'nothing that is shown'}; add that to --rows or --cols"
            )


def _numbers(row: Row, results: Results, metric: str) -> tuple[float, float, int]:
    """Mean, deviation and count of a metric; nan where a row has none."""
    if metric == ACCURACY:
        return row.mean, math.nan if row.std is None else row.std, row.n
    values = results.values(row, metric)
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan, len(values)


def _pivot_caption(results: Results, metric: str) -> list[str]:
    share = metric.startswith(SHARES)
    words = WORDS.get(metric, f"{metric}{' in %' if share else ''}")
    where = f" ({world_text(results.worlds[0])})" if len(results.worlds) == 1 else ""
    ns = [f"{n:,}" for n in sorted({row.n for row in results.rows})]
    tests = [f"{n:,}" for n in sorted({row.n_test for row in results.rows})]
    text = [
        f"{words}, mean ± standard deviation over runs{where}; n = {_range(ns)}, {_range(tests)} "
        "test images in each."
    ]
    if share:
        text.append("Bold: the best of its column in one dataset, paradigm and modality.")
    if metric == ACCURACY:
        return [*text, *protocol_notes(results.rows), *mark_notes(results.comparisons)]
    return [
        *text,
        splits_and_seeds(results.rows),
        "No difference is tested: only the accuracy is kept image by image.",
    ]


def _range(numbers: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys([numbers[0], numbers[-1]]))


def pivot_text(found: Pivot, format: str) -> str:
    """A pivot in one of `FORMATS`, without a newline at the end."""
    match format:
        case "json":
            return json.dumps(_pivot_json(found), indent=2, allow_nan=False)
        case "csv":
            return _pivot_csv(found)
        case _:
            return rendered(_pivot_layout(found), format)


def _wide(found: Pivot, column: str) -> DataFrame:
    """A column of the cells, with the keys down as index and the keys across as columns."""
    wide = found.cells.pivot(index=[*found.down], columns=[*found.across], values=column)
    return wide.sort_index(axis=0).sort_index(axis=1)


def _names(keys: Any) -> list[list[str]]:
    """The values of the keys of an index, a list for each line or column."""
    names: list[list[str]] = keys.to_frame().astype(str).to_numpy().tolist()
    return names


def _pivot_layout(found: Pivot) -> Layout:
    from pandas import DataFrame, MultiIndex

    wide, width = _wide(found, "text"), len(found.down)
    heads = _names(wide.columns)
    if len(found.across) == 1 and found.across[0] not in (*WORLD, "method"):
        heads = [[found.across[0], *head] for head in heads]
    heads = [*([""] * (len(heads[0]) - 1) + [key] for key in found.down), *heads]
    lines = zip(_names(wide.index), wide.fillna("").to_numpy().tolist(), strict=True)
    best = _wide(found, "best").eq(True).to_numpy()
    return Layout(
        frame=DataFrame(
            [[*keys, *cells] for keys, cells in lines],
            columns=MultiIndex.from_tuples(heads) if len(heads[0]) > 1 else [n for [n] in heads],
        ),
        bold=frozenset((i, width + j) for i, j in zip(*best.nonzero(), strict=True)),
        caption=found.caption,
        notes=found.notes,
    )


def _cell_text(mean: float, std: float, metric: str) -> str:
    if metric.startswith(SHARES):
        return percent(mean) + ("" if math.isnan(std) else f" ± {percent(std)}")
    return f"{mean:.4g}" + ("" if math.isnan(std) else f" ± {std:.2g}")


def _pivot_csv(found: Pivot) -> str:
    from pandas import DataFrame

    values = ["mean", "std", *(["told_from"] if found.metric == ACCURACY else [])]
    wide = {value: _wide(found, value) for value in values}
    columns = {
        " ".join([*name, *([] if value == "mean" else [value])]): wide[value].iloc[:, i]
        for i, name in enumerate(_names(wide["mean"].columns))
        for value in values
    }
    return csv_text(DataFrame(columns).reset_index())


def _pivot_json(found: Pivot) -> dict[str, Any]:
    cells = []
    for cell in found.cells.to_dict("records"):
        row: Row = cell["row"]
        std = None if math.isnan(cell["std"]) else cell["std"]
        numbers = {"mean": cell["mean"], "std": std, "n": cell["n"], "n_test": row.n_test}
        if found.metric == ACCURACY:
            numbers |= {
                "low": row.low,
                "high": row.high,
                "interval": row.interval,
                "told_from": _significant(cell["gains"]),
                "comparisons": [one.as_json() for one in cell["gains"].values()],
            }
        keys = {key: cell[key] for key in (*found.down, *found.across)}
        cells.append({**keys, **numbers, "best": cell["best"]})
    return {
        "metric": found.metric,
        "rows": list(found.down),
        "cols": list(found.across),
        "caption": [*found.caption, *found.notes],
        "cells": cells,
    }
