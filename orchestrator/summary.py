"""The screen at the end of a run: methods, differences, what was done and what comes next."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.presets import METHODS
from orchestrator.report import (
    EMPTY,
    Comparison,
    Entry,
    Results,
    Row,
    choice_notes,
    collapse_notes,
    comparisons,
    counted,
    mean_std,
    over,
    settings_text,
    signed_interval,
    varied_settings,
    worlds_of,
)
from orchestrator.statistics import Interval

BASELINES = ("fpl", "grip", "cpl")  # the screen shows gains over the first of these that is there


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
    results = Results(rows, entries)
    worlds = worlds_of(rows)
    seeds, splits = results.seeds_and_splits()
    tail = [f"{paradigm}/{modality}" for _, paradigm, modality in worlds[:1] if len(worlds) == 1]
    if splits:
        tail.append(f"{counted(seeds, 'seed')}, {counted(splits, 'split')}")
    screen.title(title, "   ".join(tail))
    if not rows:
        screen.line(EMPTY)
    for world in worlds:
        if len(worlds) > 1:
            screen.line("")
            screen.line(f"{world[0]}   {world[1]}/{world[2]}", "bold")
        _methods(screen, [row for row in rows if row.world == world], results, entries)
    _differences(screen, difference_lines(comparisons(rows, entries), many=len(worlds) > 1))
    for note in [*choice_notes(rows), *collapse_notes(rows, results)]:
        screen.folded(note)
    screen.facts(facts)
    return "\n".join(screen.lines)


@dataclass(frozen=True)
class MethodLine:
    """A row as the screen has it."""

    row: Row
    gain: Interval | None  # over the baseline
    right: float | None  # share of the last pseudo-labels
    settings: str  # those that the sweep varies; empty: none


def method_lines(
    rows: Sequence[Row], results: Results, entries: Sequence[Entry]
) -> tuple[str, list[MethodLine]]:
    """The rows of one world, controls last, and the baseline that gains are over."""
    present = {row.method for row in rows}
    baseline = next((name for name in BASELINES if name in present), rows[0].method)
    below = METHODS[baseline].host if baseline in METHODS else None  # what the baseline starts from
    controls = {method.control for method in METHODS.values()}
    varied = varied_settings(rows, entries)

    lines = []
    for row in sorted(rows, key=lambda row: row.method in controls):
        partner = None if row.method in (baseline, below) else results.partner(row, baseline)
        gain = results.difference(row, partner) if partner else None
        right = results.mean(row, "pseudo/accuracy")
        lines.append(MethodLine(row, gain, right, settings_text(row, varied)))
    return baseline, lines


def headline_of(row: Row) -> str:
    return "harmonic mean" if row.metric == "harmonic_mean" else "test accuracy"


def _methods(
    screen: _Screen, rows: Sequence[Row], results: Results, entries: Sequence[Entry]
) -> None:
    """One line per row: accuracy, gain over the baseline, pseudo-labels."""
    baseline, found = method_lines(rows, results, entries)
    lines = [(line.row, line.gain, line.right, line.settings) for line in found]

    gains = f"gain over {baseline}, 95 %" if any(gain for _, gain, *_ in lines) else ""
    name_width = max(len("method"), *(len(row.method) for row, *_ in lines))
    gain_width = max(len(gains), *[len(signed_interval(gain)) for _, gain, *_ in lines if gain], 0)
    # Settings stand in place of the bars, or on a line of their own where they are too long.
    room = screen.width - len(f" {'':{name_width}}   test accuracy   {'':{gain_width}}   100 %  ")
    longest = max(len(settings) for *_, settings in lines)
    beside = 0 < longest <= room
    bar = 0 if beside else max(0, min(20, room))

    last = "right  settings" if beside else "pseudo-labels right" if bar > 11 else "right"
    metric = headline_of(rows[0])
    screen.line(f"{'method':{name_width}}   {metric}   {gains:{gain_width}}   {last}", "dim")
    for row, gain, right, settings in lines:
        text = "" if right is None else f"{100 * right:3.0f} %"
        if beside:
            text = f"{text:5}  {settings}"
        elif right is not None:
            text += "  " + screen.painted("#" * round(right * bar), "cyan")
        shown = f"{signed_interval(gain) if gain else '':{gain_width}}"
        clear = ("green" if gain.low > 0 else "red" if gain.high < 0 else "") if gain else ""
        screen.line(
            f"{row.method:{name_width}}   {mean_std(row, '+-'):{len('test accuracy')}}   "
            f"{screen.painted(shown, clear)}   {text}"
        )
        if settings and not beside:
            screen.folded("  " + settings, "dim")


MOST = 12  # differences that are shown


def facts_screen(facts: Sequence[tuple[str, str]], *, width: int = 100) -> str:
    """Facts alone, for a run that has no result yet."""
    screen = _Screen(width=width, color=False)
    screen.facts(facts)
    return "\n".join(screen.lines)


def difference_lines(found: Sequence[Comparison], *, many: bool) -> list[tuple[str, str]]:
    """What synthetic images add to a host, and to the control without diffusion: label and text.

    Args:
        many: there are several worlds.
    """
    controls = {method.control for method in METHODS.values()}
    shown = [
        c
        for c in found
        if c.role == "control" or (METHODS[c.b].host is not None and c.a not in controls)
    ]
    often = Counter((c.a, c.b, c.row.world) for c in shown)
    lines = []
    for c in shown:
        text = f"{signed_interval(c.difference)}   "
        if c.role == "control":
            text += "control: real images, no diffusion"
        else:
            text += f"{over(c.difference)}; n_test {c.difference.n_test}"
        if c.untold:
            text += f"; {c.untold}"
        elif not c.marked:
            text += "; not told from 0"
            if not c.difference.low <= 0 <= c.difference.high:
                text += " after correction for all comparisons"
        if c.images_needed is not None:
            text += f"; needs {c.images_needed:,} test images"
        if many:
            text += f"; {c.row.dataset}, {c.row.paradigm}/{c.row.modality}"
        if often[c.a, c.b, c.row.world] > 1:
            text += f"; {settings_text(c.row, list(c.settings))}"
        lines.append((f"{c.a} - {c.b}", text))
    return lines


def _differences(screen: _Screen, lines: Sequence[tuple[str, str]]) -> None:
    width = max((len(label) for label, _ in lines[:MOST]), default=0)
    for label, text in lines[:MOST]:
        screen.folded(f"{label:<{width}}   {text}")
    if len(lines) > MOST:
        screen.line(f"{len(lines) - MOST} more differences stand in the table")


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
