"""Finished trials -> rows -> tables, and the screen at the end of a run.

A row is one setting over its runs. With a search it is the best point of its cell by the search's
objective, never by a test label. Knows predictions and metrics; neither files nor how they came.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import operator
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from air_core.specs import Ref, from_flat, trial_keys
from orchestrator.presets import METHODS
from orchestrator.statistics import (
    Array,
    Interval,
    Run,
    Runs,
    discordance,
    images_needed,
    mean_interval,
    paired_difference,
)

Format = Literal["md", "csv", "json", "latex"]

EMPTY = "no finished trial yet"
BASELINES = ("fpl", "grip", "cpl")  # the screen shows gains over the first of these that is there


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One trial of a sweep with its outcome."""

    cell: str
    method: str
    flat: dict[str, Any]  # every setting by its dotted name
    settings: dict[str, Any]  # what the sweep varies here, beside dataset, paradigm, ..., method
    point: int
    seed: int
    split_seed: int
    objective: float | None  # of the point, mean over its runs; None without a search
    metrics: dict[str, float]  # "test/accuracy_fused", "pseudo/accuracy", ...
    image_ids: Array  # (T,) test images, by their index in the dataset
    predictions: Array  # (T,)
    labels: Array  # (T,)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting over its runs. Fractions in [0, 1]."""

    dataset: str
    paradigm: str
    modality: str
    method: str
    settings: dict[str, Any]
    metric: str = "accuracy"
    n: int  # distinct computations
    n_test: int
    mean: float
    std: float | None  # None for one run
    low: float
    high: float
    interval: str  # what `low` and `high` are
    # Where the row comes from; not in its JSON.
    cell: str
    point: int
    chosen_by: str | None  # the search's objective

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def world(self) -> tuple[str, str, str]:
        """Only rows of one world are compared."""
        return self.dataset, self.paradigm, self.modality


COLUMNS = (
    *("dataset", "paradigm", "modality", "method", "settings", "metric", "n", "n_test"),
    *("mean", "std", "low", "high", "interval"),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Method `a` minus what presets say it is compared with."""

    a: str
    b: str
    role: Literal["host", "control"]  # what b is to a
    settings: dict[str, Any]  # of a
    difference: Interval  # paired by image and run
    images_needed: int | None  # to tell such a difference from 0; None: it is 0
    row: Row  # of a


# ---------------------------------------------------------------- rows


def rows(entries: Sequence[Entry], search_objective: str | None) -> list[Row]:
    """One row per setting in order of first appearance; with a search, one per cell."""
    points: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        points.setdefault((entry.cell, entry.point), []).append(entry)
    if search_objective is None:
        return [_row(group, None) for group in points.values()]
    cells: dict[str, list[list[Entry]]] = {}
    for (cell, _), group in points.items():
        cells.setdefault(cell, []).append(group)
    return [_row(max(groups, key=_promise), search_objective) for groups in cells.values()]


def _promise(group: Sequence[Entry]) -> tuple[float, int]:
    """What the best point of a cell has most of; of equal ones the earlier point is taken."""
    objective = group[0].objective
    if objective is None or math.isnan(objective):
        objective = -math.inf
    return objective, -group[0].point


def _row(group: Sequence[Entry], chosen_by: str | None) -> Row:
    first = group[0]
    found = mean_interval(_runs(_distinct(group)))
    return Row(
        dataset=str(first.flat["dataset"]),
        paradigm=str(first.flat["paradigm"]),
        modality=str(first.flat["modality"]),
        method=first.method,
        settings=dict(first.settings),
        n=found.n,
        n_test=found.n_test,
        mean=found.mean,
        std=None if math.isnan(found.std) else found.std,
        low=found.low,
        high=found.high,
        interval=found.method,
        cell=first.cell,
        point=first.point,
        chosen_by=chosen_by,
    )


def _runs(distinct: Mapping[tuple[int, int | None], Entry]) -> Runs:
    return Runs(
        tuple(
            Run(
                split_seed=split_seed,
                seed=seed,
                image_ids=entry.image_ids,
                correct=entry.predictions == entry.labels,
            )
            for (split_seed, seed), entry in distinct.items()
        )
    )


def _distinct(group: Iterable[Entry]) -> dict[tuple[int, int | None], Entry]:
    """One entry per computation: trials that a seed cannot change are one, with seed None."""
    distinct: dict[tuple[int, int | None], Entry] = {}
    seedless: bool | None = None
    for entry in group:
        if seedless is None:
            seedless = _ignores_seed(entry.flat)
        distinct.setdefault((entry.split_seed, None if seedless else entry.seed), entry)
    return distinct


def _ignores_seed(flat: dict[str, Any]) -> bool:
    """Do two seeds of these settings share one key?"""
    settings = {key: value for key, value in flat.items() if key in _trial_names()}
    names = {key: str(flat.get(key, "")) for key in ("dataset", "backbone", "generator")}
    refs = {key: Ref(name=name, digest=name) for key, name in names.items()}
    one, other = (from_flat(settings | {"seed": seed}, refs, ()).normalised() for seed in (0, 1))
    return one == other


@functools.cache
def _trial_names() -> frozenset[str]:
    return frozenset(trial_keys())


# ---------------------------------------------------------------- comparisons


def comparisons(rows: Sequence[Row], entries: Sequence[Entry]) -> list[Comparison]:
    """Each row minus its method's host and minus its control, where they were run too."""
    results = _Results(rows, entries)
    found = []
    for row in rows:
        method = METHODS.get(row.method)
        partners: tuple[tuple[Literal["host", "control"], str | None], ...] = (
            ("host", method.host if method else None),
            ("control", method.control if method else None),
        )
        for role, name in partners:
            other = results.partner(row, name) if name else None
            difference = results.difference(row, other) if other else None
            if other is None or difference is None:
                continue
            needed = images_needed(difference.mean, results.discordance(row, other))
            found.append(
                Comparison(
                    a=row.method,
                    b=other.method,
                    role=role,
                    settings=row.settings,
                    difference=difference,
                    images_needed=needed,
                    row=row,
                )
            )
    return found


class _Results:
    """The entries behind each row."""

    def __init__(self, rows: Sequence[Row], entries: Sequence[Entry]) -> None:
        self._rows = rows
        self._entries: dict[tuple[str, int], list[Entry]] = {}
        values: dict[str, dict[str, set[str]]] = {}
        for entry in entries:
            self._entries.setdefault((entry.cell, entry.point), []).append(entry)
            for key, value in entry.settings.items():
                values.setdefault(entry.cell, {}).setdefault(key, set()).add(repr(value))
        # What differs within a cell was searched: each method stands at its own best.
        self._searched = {
            cell: {key for key, seen in keys.items() if len(seen) > 1}
            for cell, keys in values.items()
        }
        self._found: dict[tuple[str, int], tuple[list[Entry], Runs | None]] = {}

    def runs(self, row: Row) -> Runs | None:
        return self._of(row)[1]

    def mean(self, row: Row, metric: str) -> float | None:
        """Mean of a metric over the runs of a row; None where no run has it."""
        found = [entry.metrics.get(metric, math.nan) for entry in self._of(row)[0]]
        found = [value for value in found if not math.isnan(value)]
        return sum(found) / len(found) if found else None

    def _of(self, row: Row) -> tuple[list[Entry], Runs | None]:
        """The computations behind a row, once each; None: the entries of this row are not here."""
        at = (row.cell, row.point)
        if at not in self._found:
            distinct = _distinct(self._entries.get(at, ()))
            runs = _runs(distinct) if distinct else None
            self._found[at] = (list(distinct.values()), runs)
        return self._found[at]

    def partner(self, row: Row, method: str) -> Row | None:
        """The row of another method with the settings that the two share; the most shared wins."""
        best: tuple[int, Row] | None = None
        for other in self._rows:
            if other.method != method or other.world != row.world or other is row:
                continue
            searched = self._searched.get(row.cell, set()) | self._searched.get(other.cell, set())
            shared = (row.settings.keys() & other.settings.keys()) - searched
            if any(row.settings[key] != other.settings[key] for key in shared):
                continue
            if best is None or len(shared) > best[0]:
                best = (len(shared), other)
        return best[1] if best else None

    def difference(self, row: Row, other: Row) -> Interval | None:
        a, b = self.runs(row), self.runs(other)
        return paired_difference(a, b) if a and b else None

    def discordance(self, row: Row, other: Row) -> float:
        a, b = self.runs(row), self.runs(other)
        return discordance(a, b) if a and b else math.nan

    def seeds_and_splits(self) -> tuple[int, int]:
        """The number of splits, and of seeds in a split, that the rows have at most."""
        per_row = [
            Counter(run.split_seed for run in runs.runs)
            for runs in map(self.runs, self._rows)
            if runs
        ]
        seeds = max((n for counts in per_row for n in counts.values()), default=0)
        return seeds, len({split for counts in per_row for split in counts})


# ---------------------------------------------------------------- tables


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
        found = row.as_json()
        settings = {f"settings.{key}": _whole(v) for key, v in found.pop("settings").items()}
        writer.writerow({**found, **settings})
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


def _layout(rows: Sequence[Row], entries: Sequence[Entry]) -> _Layout:
    results = _Results(rows, entries)
    gains = {(id(c.row), c.role): c for c in comparisons(rows, entries)}

    def setting(key: str) -> Callable[[Row], str]:
        return lambda row: _shown(row.settings.get(key, ""))

    def metric(name: str) -> Callable[[Row], str]:
        return lambda row: _percent(results.mean(row, name))

    def gain(role: Literal["host", "control"]) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            found = gains.get((id(row), role))
            return f"{_signed_interval(found.difference)} {found.b}" if found else ""

        return cell

    columns: list[tuple[str, bool, Callable[[Row], str]]] = []
    for name in ("dataset", "paradigm", "modality"):
        if len({getattr(row, name) for row in rows}) > 1:
            columns.append((name, False, operator.attrgetter(name)))
    columns.append(("method", False, lambda row: row.method))
    for key in _varied(rows, entries):
        columns.append((key, True, setting(key)))
    accuracy = len(columns)
    columns += [
        ("accuracy", True, lambda row: _mean_std(row, "±")),
        ("95 %", True, lambda row: f"[{_percent(row.low)}, {_percent(row.high)}]"),
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
    tops = {world: max(r.mean for r in rows if r.world == world) for world in _worlds(rows)}
    return _Layout(
        header=header,
        numeric=[numeric for _, numeric, _ in columns],
        lines=[[cell(row) for _, _, cell in columns] for row in rows],
        best=[row.mean == tops[row.world] for row in rows],
        accuracy=accuracy,
        caption=list(_caption(rows, results, header)),
    )


def _caption(rows: Sequence[Row], results: _Results, header: Sequence[str]) -> Iterator[str]:
    where = "; ".join(f"{d}, {p}/{m}" for d, p, m in _worlds(rows)) if rows else ""
    yield f"Test accuracy in %, mean ± standard deviation over n runs ({where})."
    seeds, splits = results.seeds_and_splits()
    if splits:
        each = " each" if splits > 1 else ""
        yield f"{_count(splits, 'split')}, {_count(seeds, 'seed')}{each}."
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
    chosen_by = next((row.chosen_by for row in rows if row.chosen_by), None)
    if chosen_by:
        yield f"Settings chosen by {chosen_by}; no test label was used."


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
    return f"{textwrap.fill(' '.join(layout.caption), 100, break_on_hyphens=False)}\n\n{body}"


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
            f"\\caption{{{_escaped(' '.join(layout.caption))}}}",
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


# ---------------------------------------------------------------- the screen


def summary(
    title: str,
    entries: Sequence[Entry],
    rows: Sequence[Row],
    facts: Sequence[tuple[str, str]],
    *,
    width: int = 100,
    color: bool = False,
) -> str:
    """What a finished run puts on the screen, at most `width` columns wide.

    Args:
        title: name of the sweep and what stands behind it; paradigm, seeds and splits are added.
        entries: the trials that the rows were made from.
        rows: from `rows`.
        facts: (label, text) lines below; an empty label for a plain line. Lines of a text that
            should not be folded are the caller's to keep short.
        width: of the terminal.
        color: with ANSI colours.
    """
    screen = _Screen(width=width, color=color)
    results = _Results(rows, entries)
    worlds = _worlds(rows)
    seeds, splits = results.seeds_and_splits()
    tail = [f"{paradigm}/{modality}" for _, paradigm, modality in worlds[:1] if len(worlds) == 1]
    if splits:
        tail.append(f"{_count(seeds, 'seed')}, {_count(splits, 'split')}")
    screen.title(title, "   ".join(tail))
    if not rows:
        screen.line(EMPTY)
    for world in worlds:
        if len(worlds) > 1:
            screen.line("")
            screen.line(f"{world[0]}   {world[1]}/{world[2]}", "bold")
        _methods(screen, [row for row in rows if row.world == world], results, entries)
    _differences(screen, comparisons(rows, entries), many=len(worlds) > 1)
    screen.facts(facts)
    return "\n".join(screen.lines)


def _methods(
    screen: _Screen, rows: Sequence[Row], results: _Results, entries: Sequence[Entry]
) -> None:
    """One line per row: accuracy, gain over the baseline, pseudo-labels."""
    present = {row.method for row in rows}
    baseline = next((name for name in BASELINES if name in present), rows[0].method)
    below = METHODS[baseline].host if baseline in METHODS else None  # what the baseline starts from
    controls = {method.control for method in METHODS.values()}
    varied = _varied(rows, entries)

    lines = []
    for row in sorted(rows, key=lambda row: row.method in controls):
        partner = None if row.method in (baseline, below) else results.partner(row, baseline)
        gain = results.difference(row, partner) if partner else None
        right = results.mean(row, "pseudo/accuracy")
        lines.append((row, gain, right, _settings(row, varied)))

    gains = f"gain over {baseline}, 95 %"
    name_width = max(len("method"), *(len(row.method) for row, *_ in lines))
    gain_width = max(len(gains), *(len(_signed_interval(gain)) for _, gain, *_ in lines if gain))
    # Settings stand in place of the bars, or on a line of their own where they are too long.
    room = screen.width - len(f" {'':{name_width}}   test accuracy   {'':{gain_width}}   100 %  ")
    longest = max(len(settings) for *_, settings in lines)
    beside = 0 < longest <= room
    bar = 0 if beside else max(0, min(20, room))

    last = "right  settings" if beside else "pseudo-labels right" if bar > 11 else "right"
    screen.line(f"{'method':{name_width}}   test accuracy   {gains:{gain_width}}   {last}", "dim")
    for row, gain, right, settings in lines:
        text = "" if right is None else f"{100 * right:3.0f} %"
        if beside:
            text = f"{text:5}  {settings}"
        elif right is not None:
            text += "  " + screen.painted("#" * round(right * bar), "cyan")
        shown = f"{_signed_interval(gain) if gain else '':{gain_width}}"
        clear = ("green" if gain.low > 0 else "red" if gain.high < 0 else "") if gain else ""
        screen.line(
            f"{row.method:{name_width}}   {_mean_std(row, '+-'):{len('test accuracy')}}   "
            f"{screen.painted(shown, clear)}   {text}"
        )
        if settings and not beside:
            screen.folded("  " + settings, "dim")


def _differences(screen: _Screen, found: Sequence[Comparison], *, many: bool) -> None:
    """What synthetic images add to a host, and what they add to the control without diffusion."""
    controls = {method.control for method in METHODS.values()}
    shown = [
        c
        for c in found
        if c.role == "control" or (METHODS[c.b].host is not None and c.a not in controls)
    ]
    often = Counter((c.a, c.b, c.row.world) for c in shown)
    limit = 12
    width = max((len(f"{c.a} - {c.b}") for c in shown[:limit]), default=0)
    for c in shown[:limit]:
        label = f"{c.a} - {c.b}"
        text = f"{label:<{width}}   {_signed_interval(c.difference)}   "
        if c.role == "control":
            text += "control: real images, no diffusion"
        else:
            text += f"{_over(c.difference)}; n_test {c.difference.n_test}"
        if c.difference.low <= 0 <= c.difference.high:
            text += "; not told from 0"
        if many:
            text += f"; {c.row.dataset}, {c.row.paradigm}/{c.row.modality}"
        if often[c.a, c.b, c.row.world] > 1:
            text += f"; {_settings(c.row, list(c.settings))}"
        screen.folded(text)
    if len(shown) > limit:
        screen.line(f"{len(shown) - limit} more differences stand in the table")


class _Screen:
    """Lines with a margin of one column, folded at the width."""

    def __init__(self, *, width: int, color: bool) -> None:
        self.width, self.color = width, color
        self.lines: list[str] = []

    def title(self, title: str, tail: str) -> None:
        one = f"{title}   {tail}"
        if tail and len(one) < self.width:
            self.line(self.painted(title, "bold") + f"   {tail}")
            return
        self.folded(title, "bold")
        if tail:
            self.line(tail)

    def line(self, text: str, style: str = "") -> None:
        self.lines.append(self.painted(f" {text}".rstrip(), style))

    def folded(self, text: str, style: str = "", indent: int = 4) -> None:
        for part in _folded(text, self.width - 1, indent):
            self.line(part, style)

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        labels = max((len(label) for label, _ in facts), default=0)
        for label, text in facts:
            lead = f"{label:<{labels}}   " if label else ""
            first = True
            for part in text.splitlines():
                for piece in _folded(part, self.width - 1 - len(lead), 2):
                    head = self.painted(lead, "bold") if first else " " * len(lead)
                    self.line(head + piece)
                    first = False

    def painted(self, text: str, style: str) -> str:
        codes = {"bold": 1, "dim": 2, "red": 31, "green": 32, "cyan": 36}
        if not self.color or not style or not text.strip():
            return text
        return f"\x1b[{codes[style]}m{text}\x1b[0m"


def _folded(text: str, width: int, indent: int) -> list[str]:
    lead = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text,
        max(width, 20),
        subsequent_indent=lead + " " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    ) or [""]


# ---------------------------------------------------------------- words and numbers


def _varied(rows: Sequence[Row], entries: Sequence[Entry]) -> list[str]:
    """Settings with more than one value in the sweep, in order of appearance."""
    seen: dict[str, set[str]] = {}
    for settings in [*(row.settings for row in rows), *(entry.settings for entry in entries)]:
        for key, value in settings.items():
            seen.setdefault(key, set()).add(repr(value))
    return [key for key, values in seen.items() if len(values) > 1]


def _settings(row: Row, keys: Iterable[str]) -> str:
    return ", ".join(f"{key} {_shown(row.settings[key])}" for key in keys if key in row.settings)


def _worlds(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(row.world for row in rows))


def _mean_std(row: Row, sign: str) -> str:
    return _percent(row.mean) + ("" if row.std is None else f" {sign} {_percent(row.std)}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _signed_interval(found: Interval) -> str:
    return f"{_signed(found.mean)} [{_signed(found.low)}, {_signed(found.high)}]"


def _signed(value: float) -> str:
    """
    >>> _signed(0.021), _signed(-0.00001)
    ('+2.1', '+0.0')
    """
    return f"{round(100 * value, 1) + 0.0:+.1f}"


def _over(found: Interval) -> str:
    """
    >>> _over(Interval(mean=0, std=0, low=0, high=0, n=3, n_test=9,
    ...                method="95 % bootstrap over images and seeds (1 split)"))
    'over images and seeds'
    """
    return found.method.removeprefix("95 % bootstrap ").partition(" (")[0]


def _shown(value: Any) -> str:
    """A setting as a reader of the sweep file would write it.

    >>> _shown(0.30000000000000004), _shown(True), _shown(None)
    ('0.3', 'true', 'null')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _whole(value: Any) -> Any:
    return _shown(value) if value is None or isinstance(value, bool) else value


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
