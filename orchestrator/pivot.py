"""Rows as a paper has them: some keys down, some across, one number in each cell.

Two settings never share a cell: nothing is averaged that was not asked for.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.layouts import Layout, csv_text, latex, markdown
from orchestrator.marked_yaml import choices, meant
from orchestrator.report import (
    Comparison,
    Entry,
    Results,
    Row,
    by_row,
    choice_notes,
    collapse_notes,
    comparisons,
    mark_notes,
    percent,
    protocol_notes,
    shown,
    splits_and_seeds,
    varied_settings,
    world_text,
    worlds_of,
)

if TYPE_CHECKING:
    from pandas import DataFrame

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
class Pivot:
    """A table with keys down and across."""

    metric: str
    down: tuple[str, ...]  # keys
    across: tuple[str, ...]
    cells: DataFrame  # one line a cell: all keys, mean, std, n (fractions), best, row, gains
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
        ValueError: a key or a metric that does not exist, or two settings for one cell.
    """
    from pandas import Categorical, DataFrame

    results, found = Results(rows, entries), comparisons(rows, entries)
    name = _metric(metric, entries)
    known = [*WORLD, *varied_settings(rows, entries)]
    cells = DataFrame([{key: _value(row, key) for key in known} for row in rows])
    columns = _keys("--cols", across if across is not None else ["dataset"], known)
    if down is None:
        rest = [key for key in known if key not in (*columns, "method") and _differs(cells, key)]
        down = [key for key in ("method", *rest) if key not in columns]
    lines = _keys("--rows", down, known)
    if twice := [key for key in lines if key in columns]:
        raise ValueError(f"--rows and --cols both have {twice[0]}; allowed: once")
    _refuse_two(cells, [*lines, *columns], known)

    for key in known:  # sorted by first appearance
        cells[key] = Categorical(cells[key], cells[key].unique())
    gains = by_row(found) if name == ACCURACY else {}
    numbers = [_numbers(row, results, name) for row in rows]
    cells = cells.assign(
        mean=[mean for mean, _, _ in numbers],
        std=[std for _, std, _ in numbers],
        n=[n for _, _, n in numbers],
        row=rows,
        gains=[list(gains.get(id(row), {}).values()) for row in rows],
    )
    cells = cells[cells["n"] > 0]
    return Pivot(
        metric=name,
        down=tuple(lines),
        across=tuple(columns),
        cells=cells.assign(best=_best(cells, columns) & (name == ACCURACY or _share(name))),
        caption=tuple(_caption(rows, name, found)),
        notes=(*choice_notes(rows), *collapse_notes(rows, results)),
    )


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


def _differs(cells: DataFrame, key: str) -> bool:
    return bool(cells[key].nunique() > 1)


def _refuse_two(cells: DataFrame, used: Sequence[str], known: Sequence[str]) -> None:
    for at, group in cells.groupby(list(used), sort=False):
        if len(group) > 1:
            differ = [key for key in known if key not in used and _differs(group, key)]
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


def _best(cells: DataFrame, columns: Sequence[str]) -> Any:
    """The best of each column; of each world in it, since worlds are not compared.

    A cell without another to be better than is not the best.
    """
    worlds = ("dataset", "paradigm", "modality")
    means = cells.groupby([*dict.fromkeys([*columns, *worlds])], observed=True)["mean"]
    return (means.transform("size") > 1) & (cells["mean"] == means.transform("max"))


def _share(metric: str) -> bool:
    return metric.startswith(SHARES)


def _caption(rows: Sequence[Row], metric: str, found: Sequence[Comparison]) -> list[str]:
    words = WORDS.get(metric, f"{metric}{' in %' if _share(metric) else ''}")
    worlds = worlds_of(rows)
    where = f" ({world_text(worlds[0])})" if len(worlds) == 1 else ""
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
        return [*text, *protocol_notes(rows), *mark_notes(found)]
    return [
        *text,
        splits_and_seeds(rows),
        "No difference is tested: only the accuracy is kept image by image.",
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


def _shown(cell: Any, metric: str) -> str:
    spread = not math.isnan(cell["std"])
    if metric != ACCURACY and not _share(metric):
        return f"{cell['mean']:.4g}" + (f" ± {cell['std']:.2g}" if spread else "")
    marks = "".join(one.mark for one in cell["gains"])
    return percent(cell["mean"]) + (f" ± {percent(cell['std'])}" if spread else "") + marks


def _wide(table: Pivot, values: Any) -> DataFrame:
    """A value of each cell, with the keys down as index and the keys across as columns."""
    keyed = table.cells.assign(value=values)
    wide = keyed.pivot(index=list(table.down), columns=list(table.across), values="value")
    return wide.sort_index(axis=0).sort_index(axis=1)


def _names(keys: Any) -> list[list[str]]:
    """The values of the keys of an index, a list for each line or column."""
    names: list[list[str]] = keys.to_frame().astype(str).to_numpy().tolist()
    return names


def _layout(table: Pivot) -> Layout:
    from pandas import DataFrame, MultiIndex

    wide = _wide(table, [_shown(cell, table.metric) for _, cell in table.cells.iterrows()])
    heads, width = _names(wide.columns), len(table.down)
    if len(table.across) == 1 and table.across[0] not in WORLD:
        heads = [[table.across[0], *head] for head in heads]
    heads = [*([""] * (len(heads[0]) - 1) + [key] for key in table.down), *heads]
    lines = zip(_names(wide.index), wide.fillna("").to_numpy().tolist(), strict=True)
    best = _wide(table, table.cells["best"]).eq(True).to_numpy()
    return Layout(
        frame=DataFrame(
            [[*keys, *cells] for keys, cells in lines],
            columns=MultiIndex.from_tuples(heads) if len(heads[0]) > 1 else [n for [n] in heads],
        ),
        bold=frozenset((i, width + j) for i, j in zip(*best.nonzero(), strict=True)),
        caption=table.caption,
        notes=table.notes,
    )


def _csv(table: Pivot) -> str:
    from pandas import DataFrame

    words = [" ".join(_told_from(gains)) for gains in table.cells["gains"]]
    of = {"": table.cells["mean"], " std": table.cells["std"], " told_from": words}
    if table.metric != ACCURACY:
        del of[" told_from"]
    wide = {value: _wide(table, found) for value, found in of.items()}
    names = [" ".join(name) for name in _names(wide[""].columns)]
    columns = {
        f"{name}{value}": found.iloc[:, i]
        for i, name in enumerate(names)
        for value, found in wide.items()
    }
    return csv_text(DataFrame(columns).reset_index())


def _told_from(gains: Sequence[Comparison]) -> list[str]:
    return [one.word for one in gains if one.significant]


def _json(table: Pivot) -> dict[str, Any]:
    cells = []
    for cell in table.cells.to_dict("records"):
        row: Row = cell["row"]
        std = None if math.isnan(cell["std"]) else cell["std"]
        found = {key: cell[key] for key in (*table.down, *table.across)}
        found |= {"mean": cell["mean"], "std": std, "n": cell["n"], "n_test": row.n_test}
        if table.metric == ACCURACY:
            found |= {
                "low": row.low,
                "high": row.high,
                "interval": row.interval,
                "told_from": _told_from(cell["gains"]),
                "comparisons": [one.as_json() for one in cell["gains"]],
            }
        cells.append({**found, "best": cell["best"]})
    return {
        "metric": table.metric,
        "rows": list(table.down),
        "cols": list(table.across),
        "caption": [*table.caption, *table.notes],
        "cells": cells,
    }
