"""The screen at the end of a run: results, differences, what was done and what comes next."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from orchestrator.output import aligned
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
    protocol_notes,
    settings_text,
    signed_interval,
    worlds_of,
)
from orchestrator.tables import records

MOST = 12  # differences that are shown
WIDE_ONLY = ("n_test", "fused", "gain over host", "gain over control")  # columns of `table` alone


def summary(
    title: str,
    entries: Sequence[Entry],
    rows: Sequence[Row],
    facts: Sequence[tuple[str, str]],
    *,
    width: int = 100,
) -> str:
    """What a finished run puts on the screen, at most `width` columns wide.

    Args:
        title: name of the sweep and its data; paradigm, seeds and splits are added.
        entries: the trials that the rows were made from.
        rows: from `rows`.
        facts: (label, text) lines below; an empty label for a plain line. Lines of a text that
            should not be folded are the caller's to keep short.
        width: of the terminal.
    """
    results, worlds = Results(rows, entries), worlds_of(rows)
    tail = [f"{paradigm}/{modality}" for _, paradigm, modality in worlds[:1] if len(worlds) == 1]
    lines = _folded("   ".join([title, *tail]), width)
    if not rows:
        return "\n".join([*lines, f" {EMPTY}", *_facts(facts, width)])
    found = comparisons(rows, entries)
    table = records(rows, entries, found)
    shown = [name for name in table[0] if name not in WIDE_ONLY]
    cells = [shown, *([line[name] for name in shown] for line in table)]
    lines += [f" {line}" for line in aligned(cells, width - 1)]
    differences = difference_lines(found)
    lines += _facts(differences[:MOST], width)
    if len(differences) > MOST:
        lines.append(f" {len(differences) - MOST} more differences stand in the table")
    for note in [
        *protocol_notes(rows),
        *choice_notes(rows),
        *collapse_notes(rows, results),
    ]:
        lines += _folded(note, width)
    return "\n".join([*lines, *_facts(facts, width)])


def difference_lines(found: Sequence[Comparison]) -> list[tuple[str, str]]:
    """What synthetic images add to a host, and to the control without diffusion: label and text."""
    controls = {method.control for method in METHODS.values()}
    shown = [
        c
        for c in found
        if c.role == "control" or (METHODS[c.b].host is not None and c.a not in controls)
    ]
    often = Counter((c.a, c.b, c.row.world) for c in shown)
    many = len({c.row.world for c in found}) > 1
    return [
        (f"{c.a} - {c.b}", "; ".join(_parts(c, many, often[c.a, c.b, c.row.world] > 1)))
        for c in shown
    ]


def _parts(c: Comparison, many: bool, settings: bool) -> list[str]:
    """The difference with its interval, what it is over, and whether it is significant."""
    parts = [signed_interval(c.difference)]
    if c.role == "control":
        parts.append("control: real images, no diffusion")
    if c.reason_not_tested:
        parts.append(c.reason_not_tested)
    else:
        parts.append("significant" if c.significant else "not significant")
    parts.append(f"n {c.difference.n}, n_test {c.difference.n_test}")
    if c.difference.images_needed is not None and not c.significant:
        parts.append(f"a difference of this size needs {c.difference.images_needed:,} test images")
    if many:
        parts.append(f"{c.row.dataset}, {c.row.paradigm}/{c.row.modality}")
    if settings:
        parts.append(settings_text(c.row, list(c.settings)))
    return parts


def _facts(facts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Texts beside their labels. Commands and paths are not broken."""
    labels = max((len(label) for label, _ in facts), default=0)
    lines = []
    for label, text in facts:
        lead = f"{label:<{labels}}   " if label else ""
        for part in text.splitlines():
            lines += _folded(part, width, lead)
            lead = " " * len(lead)
    return lines


def _folded(text: str, width: int, lead: str = "") -> list[str]:
    indent = " " * (len(lead) + len(text) - len(text.lstrip()) + 3)
    return textwrap.wrap(
        text,
        width,
        initial_indent=f" {lead}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
