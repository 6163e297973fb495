"""Rows as Markdown, CSV, JSON and LaTeX, with the protocol in the caption."""

from __future__ import annotations

import csv
import io
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from orchestrator.layouts import Layout, latex, markdown
from orchestrator.output import csv_cell
from orchestrator.report import (
    COLUMNS,
    EMPTY,
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
    mean_std,
    percent,
    protocol_notes,
    shown,
    signed_interval,
    varied_settings,
    whole,
    worlds_of,
)

Format = Literal["md", "csv", "json", "latex"]


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
    results, gains = Results(rows, entries), _by_row(comparisons(rows, entries))
    return [
        row.as_json()
        | {
            "comparisons": [c.as_json() for c in gains.get(id(row), {}).values()],
            "collapsed": [vars(one) for one in results.collapsed(row)],
        }
        for row in rows
    ]


def _by_row(found: Sequence[Comparison]) -> Mapping[int, Mapping[Role, Comparison]]:
    by_row: dict[int, dict[Role, Comparison]] = {}
    for one in found:
        by_row.setdefault(id(one.row), {})[one.role] = one
    return by_row


def _told_from(found: Mapping[Role, Comparison]) -> str:
    return " ".join(one.word for one in found.values() if one.marked)


def _csv(rows: Sequence[Row], entries: Sequence[Entry]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    plain = [name for name in COLUMNS if name != "settings"]
    at = COLUMNS.index("settings")
    settings_keys = [f"settings.{key}" for key in keys]
    header = [*plain[:at], *settings_keys, *plain[at:], "told_from", "collapsed"]
    results, gains = Results(rows, entries), _by_row(comparisons(rows, entries))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        settings = {f"settings.{key}": csv_cell(whole(v)) for key, v in row.settings.items()}
        found = {
            "told_from": _told_from(gains.get(id(row), {})),
            "collapsed": len(results.collapsed(row)),
        }
        writer.writerow(
            {**{name: csv_cell(getattr(row, name)) for name in plain}, **settings, **found}
        )
    return text.getvalue().rstrip("\n")


def laid_out(
    rows: Sequence[Row], entries: Sequence[Entry], found: Sequence[Comparison] | None = None
) -> Layout:
    """found: the rows' comparisons, where somebody has them: they take most of the time."""
    results = Results(rows, entries)
    found = comparisons(rows, entries) if found is None else found
    gains = _by_row(found)

    def setting(key: str) -> Callable[[Row], str]:
        return lambda row: shown(row.settings.get(key, ""))

    def metric(name: str) -> Callable[[Row], str]:
        return lambda row: percent(results.mean(row, name))

    def gain(role: Role) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            one = gains.get(id(row), {}).get(role)
            return f"{signed_interval(one.difference)} {one.b}{one.mark}" if one else ""

        return cell

    columns: list[tuple[str, bool, Callable[[Row], str]]] = []
    for name in ("dataset", "paradigm", "modality"):
        if len({getattr(row, name) for row in rows}) > 1:
            columns.append((name, False, operator.attrgetter(name)))
    columns.append(("method", False, lambda row: row.method))
    for key in varied_settings(rows, entries):
        columns.append((key, True, setting(key)))
    accuracy = len(columns)
    columns += [
        ("accuracy", True, lambda row: mean_std(row, "±")),
        ("95 %", True, lambda row: f"[{percent(row.low)}, {percent(row.high)}]"),
        ("n", True, lambda row: str(row.n)),
        ("n_test", True, lambda row: str(row.n_test)),
    ]
    optional: list[tuple[str, bool, Callable[[Row], str]]] = [
        ("fused", True, metric("test/accuracy_fused")),
        ("pseudo-labels", True, metric("pseudo/accuracy")),
        ("gain over host", False, gain("host")),
        ("gain over control", False, gain("control")),
    ]
    columns += [column for column in optional if any(column[2](row) for row in rows)]
    header = [name for name, _, _ in columns]
    tops = {world: max(r.mean for r in rows if r.world == world) for world in worlds_of(rows)}
    return Layout(
        header=header,
        numeric=[numeric for _, numeric, _ in columns],
        lines=[[cell(row) for _, _, cell in columns] for row in rows],
        bold={(i, accuracy) for i, row in enumerate(rows) if row.mean == tops[row.world]},
        caption=[*_caption(rows, results, header), *mark_notes(found)],
        notes=[*choice_notes(rows), *collapse_notes(rows, results)],
        superscripts=SUPERSCRIPTS,
    )


def _caption(rows: Sequence[Row], results: Results, header: Sequence[str]) -> Iterator[str]:
    where = "; ".join(f"{d}, {p}/{m}" for d, p, m in worlds_of(rows))
    yield f"Test accuracy in %, mean ± standard deviation over n runs ({where})."
    yield from protocol_notes(rows, results)
    yield "n_test: test images of one run."
    if "fused" in header:
        yield "Fused: text and auxiliary classifier together."
    if "pseudo-labels" in header:
        yield "Pseudo-labels: share of the last ones that is right."
    if any(name.startswith("gain") for name in header):
        yield "Gains in points with their 95 % interval, paired by image and run."
