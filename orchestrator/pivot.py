"""Rows as a paper has them: some keys down, some across, one number in each cell.

Two settings never share a cell: nothing is averaged that was not asked for.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from air_core.printable import printable
from orchestrator.layouts import Layout, latex, markdown
from orchestrator.marked_yaml import choices, meant
from orchestrator.report import (
    SUPERSCRIPTS,
    Comparison,
    Entry,
    Results,
    Role,
    Row,
    choice_notes,
    collapse_notes,
    comparisons,
    mark_notes,
    percent,
    protocol_notes,
    shown,
    splits_and_seeds,
    varied_settings,
    worlds_of,
)

WORLD = ("dataset", "paradigm", "modality", "method")
NOTHING = "\u2013"  # of a setting that does not apply to a method

# Short names of metrics; any other that the records have can be asked for by its own.
METRICS = {
    "fused": "test/accuracy_fused",
    "text": "test/accuracy_text",
    "auxiliary": "test/accuracy_auxiliary",
    "seen": "test/seen",
    "unseen": "test/unseen",
    "pseudo-labels": "pseudo/accuracy",
    "coverage": "pseudo/coverage",
    "seconds": "time/train_s",
}
ACCURACY = "accuracy"  # what the paradigm is judged by, with interval and marks
WORDS = {
    ACCURACY: "Test accuracy in %",
    "test/accuracy_fused": "Test accuracy in % of text and auxiliary classifier together",
    "test/accuracy_text": "Test accuracy in % of the text classifier",
    "test/accuracy_auxiliary": "Test accuracy in % of the auxiliary classifier alone",
    "test/seen": "Test accuracy in % on seen classes",
    "test/unseen": "Test accuracy in % on unseen classes",
    "pseudo/accuracy": "Share in % of the last pseudo-labels that is right",
    "pseudo/coverage": "Share in % of the pool that the last pseudo-labels cover",
    "time/train_s": "Seconds of training",
}
SHARES = ("test/", "pseudo/", "pool/", "objective/validation_accuracy")  # shown in %


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting in a pivoted table; fractions, not percent."""

    row: Row
    mean: float
    std: float | None
    n: int
    best: bool = False
    told: Mapping[Role, Comparison]

    @property
    def marks(self) -> str:
        return "".join(one.mark for one in self.told.values())


@dataclass(frozen=True, kw_only=True)
class Pivot:
    """A table with keys down and across."""

    metric: str
    down: tuple[str, ...]  # keys
    across: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]  # values of the keys down, as they are shown
    columns: tuple[tuple[str, ...], ...]
    cells: Mapping[tuple[tuple[str, ...], tuple[str, ...]], Cell]
    caption: tuple[str, ...]
    notes: tuple[str, ...]


def pivot(
    rows: Sequence[Row],
    entries: Sequence[Entry],
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
        ValueError: a key or a metric that is not there, or two settings for one cell.
    """
    known = [*WORLD, *varied_settings(rows, entries)]
    columns = _keys("--cols", across if across is not None else ["dataset"], known)
    if down is None:
        rest = [key for key in known if key not in (*columns, "method") and _differs(rows, key)]
        down = [key for key in ("method", *rest) if key not in columns]
    lines = _keys("--rows", down, known)
    twice = [key for key in lines if key in columns]
    if twice:
        raise ValueError(f"--rows and --cols both have {twice[0]}; allowed: once")

    results, found = Results(rows, entries), comparisons(rows, entries)
    name = _metric(metric, entries)
    told: dict[int, dict[Role, Comparison]] = {}
    if name == ACCURACY:
        for one in found:
            told.setdefault(id(one.row), {})[one.role] = one
    placed: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Row]] = {}
    for row in rows:
        at = (tuple(_value(row, k) for k in lines), tuple(_value(row, k) for k in columns))
        placed.setdefault(at, []).append(row)
    for at, group in placed.items():
        _refuse_two(at, group, [*lines, *columns], known)
    cells = {
        at: cell
        for at, (row,) in placed.items()
        if (cell := _cell(row, results, name, told.get(id(row), {})))
    }
    if name == ACCURACY or _share(name):
        cells = _with_best(cells)
    return Pivot(
        metric=name,
        down=tuple(lines),
        across=tuple(columns),
        lines=_ordered(line for line, _ in cells),
        columns=_ordered(column for _, column in cells),
        cells=cells,
        caption=tuple(_caption(rows, name, results, found)),
        notes=(*choice_notes(rows), *collapse_notes(rows, results)),
    )


def _ordered(places: Iterable[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Each once, key by key in the order in which its values came."""
    found = list(dict.fromkeys(places))
    ranks: list[dict[str, int]] = [{} for _ in (found[0] if found else ())]
    for place in found:
        for rank, value in zip(ranks, place, strict=True):
            rank.setdefault(value, len(rank))
    return tuple(sorted(found, key=lambda p: [r[v] for r, v in zip(ranks, p, strict=True)]))


def _keys(option: str, keys: Sequence[str], known: Sequence[str]) -> list[str]:
    if not keys:
        raise ValueError(f"{option} names nothing; allowed: {', '.join(known)}")
    for key in keys:
        if key not in known:
            raise ValueError(f"{option} {key}: the sweep varies no such key; {choices(key, known)}")
        if list(keys).count(key) > 1:
            raise ValueError(f"{option} has {key} twice; allowed: once")
    return list(keys)


def _metric(name: str, entries: Sequence[Entry]) -> str:
    there = list(dict.fromkeys(key for entry in entries for key in entry.metrics))
    found = METRICS.get(name, name)
    if found == ACCURACY or found in there:
        return found
    short = [word for word, key in METRICS.items() if key in there]
    others = [key for key in there if key not in METRICS.values()]
    options = [ACCURACY, *short, *others]
    raise ValueError(
        f"--metric {name}: no trial of this sweep has it; there: {', '.join(options)}"
        f"{meant(name, options)}"
    )


def _value(row: Row, key: str) -> str:
    if key in WORLD:
        return str(getattr(row, key))
    return shown(row.settings[key]) if key in row.settings else NOTHING


def _differs(rows: Sequence[Row], key: str) -> bool:
    return len({_value(row, key) for row in rows}) > 1


def _refuse_two(
    at: tuple[tuple[str, ...], tuple[str, ...]],
    group: Sequence[Row],
    used: Sequence[str],
    known: Sequence[str],
) -> None:
    if len(group) == 1:
        return
    differ = [key for key in known if key not in used and _differs(group, key)]
    where = ", ".join(value for part in at for value in part)
    raise ValueError(
        f"{len(group)} settings share the cell of {where}: they differ in "
        f"{', '.join(differ) or 'nothing that is shown'}; add that to --rows or --cols"
    )


def _cell(row: Row, results: Results, metric: str, told: Mapping[Role, Comparison]) -> Cell | None:
    if metric == ACCURACY:
        return Cell(row=row, mean=row.mean, std=row.std, n=row.n, told=told)
    values = results.values(row, metric)
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Cell(row=row, mean=statistics.fmean(values), std=std, n=len(values), told=told)


def _with_best(
    cells: Mapping[tuple[tuple[str, ...], tuple[str, ...]], Cell],
) -> dict[tuple[tuple[str, ...], tuple[str, ...]], Cell]:
    """The best of each column; of each world in it, since worlds are not compared.

    A cell without another to be better than is not the best.
    """
    groups: dict[Any, list[float]] = {}
    for (_, column), cell in cells.items():
        groups.setdefault((column, cell.row.world), []).append(cell.mean)
    found = {}
    for (line, column), cell in cells.items():
        means = groups[column, cell.row.world]
        best = len(means) > 1 and cell.mean == max(means)
        found[line, column] = replace(cell, best=best)
    return found


def _share(metric: str) -> bool:
    return metric.startswith(SHARES)


def _caption(
    rows: Sequence[Row], metric: str, results: Results, found: Sequence[Comparison]
) -> list[str]:
    words = WORDS.get(metric, f"{metric}{' in %' if _share(metric) else ''}")
    worlds = worlds_of(rows)
    where = f" ({worlds[0][0]}, {worlds[0][1]}/{worlds[0][2]})" if len(worlds) == 1 else ""
    ns = sorted({row.n for row in rows})
    n = f"n = {ns[0]}" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]}"
    tests = sorted({row.n_test for row in rows})
    images = f"{tests[0]:,}" if len(tests) == 1 else f"{tests[0]:,} to {tests[-1]:,}"
    text = [
        f"{words}, mean ± standard deviation over runs{where}; {n}, {images} test images in each."
    ]
    if metric == ACCURACY or _share(metric):
        text.append("Bold: the best of its column in one dataset, paradigm and modality.")
    if metric == ACCURACY:
        return [*text, *protocol_notes(rows, results), *mark_notes(found)]
    return [
        *text,
        splits_and_seeds(results),
        "Nothing is told apart: image by image only the accuracy is kept.",
    ]


# ---------------------------------------------------------------- as text


def text(table: Pivot, format: str) -> str:
    """md, latex, csv or json, without a newline at the end."""
    match format:
        case "json":
            return json.dumps(_json(table), indent=2, allow_nan=False)
        case "csv":
            return _csv(table)
        case "latex":
            return latex(_layout(table))
        case _:
            return markdown(_layout(table))


def _shown(table: Pivot, cell: Cell | None) -> str:
    if cell is None:
        return ""
    if table.metric == ACCURACY or _share(table.metric):
        spread = "" if cell.std is None else f" ± {percent(cell.std)}"
        return f"{percent(cell.mean)}{spread}{cell.marks}"
    return f"{cell.mean:.4g}" + ("" if cell.std is None else f" ± {cell.std:.2g}")


def _layout(table: Pivot) -> Layout:
    at = [(line, column) for line in table.lines for column in table.columns]
    width = len(table.down)
    bold = set()
    for i, (line, column) in enumerate(at):
        cell = table.cells.get((line, column))
        if cell is not None and cell.best:
            bold.add((i // len(table.columns), width + i % len(table.columns)))
    one = len(table.across) == 1
    groups: list[tuple[str, int]] = []
    if not one:
        groups.append(("", width))
        for column in table.columns:
            words = " ".join(column[:-1])
            if groups[-1][0] == words:
                groups[-1] = (words, groups[-1][1] + 1)
            else:
                groups.append((words, 1))
    elif table.across[0] not in WORLD:
        groups = [("", width), (table.across[0], len(table.columns))]
    return Layout(
        header=[*table.down, *(column[-1] for column in table.columns)],
        numeric=[False] * width + [True] * len(table.columns),
        lines=[
            [*line, *(_shown(table, table.cells.get((line, c))) for c in table.columns)]
            for line in table.lines
        ],
        bold=bold,
        caption=list(table.caption),
        notes=list(table.notes),
        groups=groups,
        superscripts=SUPERSCRIPTS,
    )


def _csv(table: Pivot) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [printable(" ".join(column)) for column in table.columns]
    marked = table.metric == ACCURACY
    writer.writerow(
        [
            *table.down,
            *(
                word
                for name in names
                for word in (name, f"{name} std", *([f"{name} told_from"] if marked else []))
            ),
        ]
    )
    for line in table.lines:
        found: list[Any] = [printable(name) for name in line]
        for column in table.columns:
            cell = table.cells.get((line, column))
            found += ["", ""] if cell is None else [cell.mean, cell.std]
            if marked:
                found.append("" if cell is None else " ".join(_told(cell)))
        writer.writerow(found)
    return out.getvalue().rstrip("\n")


def _told(cell: Cell) -> list[str]:
    return [one.word for one in cell.told.values() if one.marked]


def _json(table: Pivot) -> dict[str, Any]:
    cells = []
    for (line, column), cell in table.cells.items():
        found: dict[str, Any] = dict(zip(table.down, line, strict=True))
        found |= dict(zip(table.across, column, strict=True))
        found |= {"mean": cell.mean, "std": cell.std, "n": cell.n, "n_test": cell.row.n_test}
        if table.metric == ACCURACY:
            found |= {
                "low": cell.row.low,
                "high": cell.row.high,
                "interval": cell.row.interval,
                "told_from": _told(cell),
                "comparisons": [one.as_json() for one in cell.told.values()],
            }
        cells.append({**found, "best": cell.best})
    return {
        "metric": table.metric,
        "rows": list(table.down),
        "cols": list(table.across),
        "caption": [*table.caption, *table.notes],
        "cells": cells,
    }
