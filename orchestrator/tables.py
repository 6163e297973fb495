"""Rows as Markdown, CSV, JSON and LaTeX, with the protocol in the caption."""

from __future__ import annotations

import csv
import io
import json
import operator
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.report import (
    COLUMNS,
    EMPTY,
    Entry,
    Results,
    Row,
    choice_notes,
    comparisons,
    counted,
    mean_std,
    percent,
    shown,
    signed_interval,
    varied_settings,
    whole,
    worlds_of,
)

Format = Literal["md", "csv", "json", "latex"]


def table(rows: Sequence[Row], format: Format, entries: Sequence[Entry] = ()) -> str:
    """The rows as text, without a newline at the end.

    entries: what the rows were made from; md and latex take the other inferences, the
    pseudo-labels and the gains from them.
    """
    match format:
        case "json":
            return json.dumps([row.as_json() for row in rows], indent=2, allow_nan=False)
        case "csv":
            return _csv(rows)
        case "md":
            return _markdown(_layout(rows, entries)) if rows else f"{EMPTY.capitalize()}."
        case "latex":
            return _latex(_layout(rows, entries)) if rows else f"% {EMPTY}"


def _csv(rows: Sequence[Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    plain = [name for name in COLUMNS if name != "settings"]
    at = COLUMNS.index("settings")
    header = [*plain[:at], *(f"settings.{key}" for key in keys), *plain[at:]]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        settings = {f"settings.{key}": whole(v) for key, v in row.settings.items()}
        writer.writerow({**{name: getattr(row, name) for name in plain}, **settings})
    return text.getvalue().rstrip("\n")


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """A table for readers, before it has a syntax."""

    header: list[str]
    numeric: list[bool]  # columns that are right-aligned
    lines: list[list[str]]
    best: list[bool]  # the line with the highest mean of its world
    accuracy: int  # the column that is in bold in the best line
    caption: list[str]  # sentences
    notes: list[str]  # sentences below the table


def _layout(rows: Sequence[Row], entries: Sequence[Entry]) -> _Layout:
    results = Results(rows, entries)
    gains = {(id(c.row), c.role): c for c in comparisons(rows, entries)}

    def setting(key: str) -> Callable[[Row], str]:
        return lambda row: shown(row.settings.get(key, ""))

    def metric(name: str) -> Callable[[Row], str]:
        return lambda row: percent(results.mean(row, name))

    def gain(role: Literal["host", "control"]) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            found = gains.get((id(row), role))
            return f"{signed_interval(found.difference)} {found.b}" if found else ""

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
    return _Layout(
        header=header,
        numeric=[numeric for _, numeric, _ in columns],
        lines=[[cell(row) for _, _, cell in columns] for row in rows],
        best=[row.mean == tops[row.world] for row in rows],
        accuracy=accuracy,
        caption=list(_caption(rows, results, header)),
        notes=choice_notes(rows),
    )


def _caption(rows: Sequence[Row], results: Results, header: Sequence[str]) -> Iterator[str]:
    where = "; ".join(f"{d}, {p}/{m}" for d, p, m in worlds_of(rows)) if rows else ""
    yield f"Test accuracy in %, mean ± standard deviation over n runs ({where})."
    if any(row.metric == "harmonic_mean" for row in rows):
        yield "TRZSL: harmonic mean of the accuracies on seen and on unseen classes."
    seeds, splits = results.seeds_and_splits()
    if splits:
        each = " each" if splits > 1 else ""
        yield f"{counted(splits, 'split')}, {counted(seeds, 'seed')}{each}."
    kinds = Counter(row.interval for row in rows)
    usual = kinds.most_common(1)[0][0]
    text = f"Interval: {usual}"
    for kind in kinds:
        if kind != usual:
            methods = dict.fromkeys(row.method for row in rows if row.interval == kind)
            text += f"; {', '.join(methods)}: {kind.removeprefix('95 % bootstrap ')}"
    yield text + "."
    yield "n_test: test images of one run."
    if "fused" in header:
        yield "Fused: text and auxiliary classifier together."
    if "pseudo-labels" in header:
        yield "Pseudo-labels: share of the last ones that is right."
    if any(name.startswith("gain") for name in header):
        yield "Gains in points with their 95 % interval, paired by image and run."


def _markdown(layout: _Layout) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in layout.lines]
    for line, best in zip(lines, layout.best, strict=True):
        if best:
            line[layout.accuracy] = f"**{line[layout.accuracy]}**"
    widths = [max(3, *map(len, column)) for column in zip(layout.header, *lines, strict=True)]

    def padded(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, layout.numeric, strict=True)
        ]
        return f"| {' | '.join(cells)} |"

    rule = [
        "-" * (width - 1) + ":" if right else "-" * width
        for width, right in zip(widths, layout.numeric, strict=True)
    ]
    body = "\n".join([padded(layout.header), padded(rule), *map(padded, lines)])
    texts = [_filled(layout.caption), body, *([_filled(layout.notes)] if layout.notes else [])]
    return "\n\n".join(texts)


def _filled(sentences: Sequence[str]) -> str:
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False)


def _latex(layout: _Layout) -> str:
    """A booktabs table."""
    lines = [[_escaped(cell) for cell in line] for line in layout.lines]
    for line, best in zip(lines, layout.best, strict=True):
        if best:
            line[layout.accuracy] = f"\\textbf{{{line[layout.accuracy]}}}"
    header = [_escaped(name) for name in layout.header]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{_escaped(' '.join([*layout.caption, *layout.notes]))}}}",
            f"\\begin{{tabular}}{{{''.join('r' if right else 'l' for right in layout.numeric)}}}",
            r"\toprule",
            f"{' & '.join(header)} \\\\",
            r"\midrule",
            *(f"{' & '.join(line)} \\\\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": "$<$",
    ">": "$>$",
}


def _escaped(text: str) -> str:
    """
    >>> print(_escaped("zero_shot: -2.1 ± 0.3 %"))
    zero\\_shot: $-$2.1 $\\pm$ 0.3 \\%
    """
    plain = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w.\]-])-(?=\d)", "$-$", plain)  # a minus sign; 1e-3 keeps its hyphen
