"""Rows as Markdown, CSV, JSON and LaTeX, with the protocol in the caption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from orchestrator.layouts import Layout, csv_text, latex, markdown
from orchestrator.report import (
    COLUMNS,
    EMPTY,
    Comparison,
    Entry,
    Results,
    Role,
    Row,
    by_row,
    choice_notes,
    collapse_notes,
    comparisons,
    mark_notes,
    mean_std,
    percent,
    protocol_notes,
    shown,
    signed_interval,
    varied_settings,
    worlds_of,
)

Format = Literal["md", "csv", "json", "latex"]
WORLD = ("dataset", "paradigm", "modality")  # columns that are left out where all rows share them


def table(rows: Sequence[Row], format: Format, entries: Sequence[Entry] = ()) -> str:
    """The rows as text, without a newline at the end.

    entries: what the rows were made from; the other inferences, the pseudo-labels, the gains and
    the runs that collapsed come from them.
    """
    match format:
        case "json":
            return json.dumps(as_json(rows, entries), indent=2, allow_nan=False)
        case "csv":
            return _csv(rows, entries)
        case "md":
            return markdown(laid_out(rows, entries)) if rows else f"{EMPTY.capitalize()}."
        case "latex":
            return latex(laid_out(rows, entries)) if rows else f"% {EMPTY}"


def as_json(rows: Sequence[Row], entries: Sequence[Entry] = ()) -> list[dict[str, object]]:
    """The contract of `table --format json`: keys are added, none is removed."""
    results, gains = Results(rows, entries), by_row(comparisons(rows, entries))
    return [
        row.as_json()
        | {
            "comparisons": [c.as_json() for c in gains.get(id(row), {}).values()],
            "collapsed": [vars(one) for one in results.collapsed(row)],
        }
        for row in rows
    ]


def _csv(rows: Sequence[Row], entries: Sequence[Entry]) -> str:
    from pandas import DataFrame

    keys = dict.fromkeys(f"settings.{key}" for row in rows for key in row.settings)
    at = COLUMNS.index("settings")
    header = [*COLUMNS[:at], *keys, *COLUMNS[at + 1 :], "told_from", "collapsed"]
    results, gains = Results(rows, entries), by_row(comparisons(rows, entries))
    lines = [
        {
            **{name: getattr(row, name) for name in COLUMNS},
            **{f"settings.{key}": _in_full(value) for key, value in row.settings.items()},
            "told_from": " ".join(filter(None, (c.word for c in gains.get(id(row), {}).values()))),
            "collapsed": len(results.collapsed(row)),
        }
        for row in rows
    ]
    return csv_text(DataFrame(lines, columns=header, dtype=object))


def _in_full(value: Any) -> Any:
    """A setting with all its digits; true and null as the sweep file writes them."""
    return shown(value) if value is None or isinstance(value, bool) else value


def laid_out(
    rows: Sequence[Row], entries: Sequence[Entry], found: Sequence[Comparison] | None = None
) -> Layout:
    """found: the comparisons of the rows, where they are known already: they take most time."""
    from pandas import DataFrame

    results = Results(rows, entries)
    found = comparisons(rows, entries) if found is None else found
    frame = DataFrame(records(rows, entries, found))
    tops = {world: max(r.mean for r in rows if r.world == world) for world in worlds_of(rows)}
    accuracy = frame.columns.get_loc("accuracy")
    return Layout(
        frame=frame,
        bold=frozenset((i, accuracy) for i, row in enumerate(rows) if row.mean == tops[row.world]),
        caption=[*_caption(rows, list(frame.columns)), *mark_notes(found)],
        notes=[*choice_notes(rows), *collapse_notes(rows, results)],
    )


def records(
    rows: Sequence[Row], entries: Sequence[Entry], found: Sequence[Comparison]
) -> list[dict[str, str]]:
    """A line for each row: its column names and texts, without columns that say nothing."""
    results, gains = Results(rows, entries), by_row(found)
    varied = varied_settings(rows, entries)

    def gain(row: Row, role: Role) -> str:
        one = gains.get(id(row), {}).get(role)
        return f"{signed_interval(one.difference)} {one.b}{one.mark}" if one else ""

    lines = [
        {
            "dataset": row.dataset,
            "paradigm": row.paradigm,
            "modality": row.modality,
            "method": row.method,
            **{key: shown(row.settings.get(key, "")) for key in varied},
            "accuracy": mean_std(row),
            "95 %": f"[{percent(row.low)}, {percent(row.high)}]",
            "n": str(row.n),
            "n_test": str(row.n_test),
            "fused": percent(results.mean(row, "test/accuracy_fused")),
            "pseudo-labels": percent(results.mean(row, "pseudo/accuracy")),
            "gain over host": gain(row, "host"),
            "gain over control": gain(row, "control"),
        }
        for row in rows
    ]
    values = {name: {line[name] for line in lines} for name in (lines[0] if lines else ())}
    same = {name for name in WORLD if lines and len(values[name]) == 1}
    kept = [name for name, found in values.items() if name not in same and found != {""}]
    return [{name: line[name] for name in kept} for line in lines]


def _caption(rows: Sequence[Row], header: Sequence[str]) -> Iterator[str]:
    where = "; ".join(f"{d}, {p}/{m}" for d, p, m in worlds_of(rows))
    yield f"Test accuracy in %, mean ± standard deviation over n runs ({where})."
    yield from protocol_notes(rows)
    yield "n_test: test images of one run."
    if "fused" in header:
        yield "Fused: text and auxiliary classifier together."
    if "pseudo-labels" in header:
        yield "Pseudo-labels: share of the last pseudo-labels that is right."
    if any(name.startswith("gain") for name in header):
        yield "Gains in points with their 95 % interval, paired by image and run."
