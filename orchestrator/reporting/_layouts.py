"""Tables of text cells and their Markdown, without pandas, whose import takes half a second."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from orchestrator.formatting import are_numbers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table with caption and notes, independent of the output format."""

    lines: Sequence[Mapping[str, str]]  # cells by column, which all lines have
    caption: Sequence[str] = ()  # sentences
    notes: Sequence[str] = ()  # sentences below the table

    @property
    def columns(self) -> dict[str, list[str]]:
        return {name: [line[name] for line in self.lines] for name in self.lines[0]}

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers only and is right-aligned."""
        return [*map(are_numbers, self.columns.values())]


def without(lines: Sequence[Mapping[str, str]], left_out: Collection[str]) -> list[dict[str, str]]:
    """Lines of a table without some columns, and without those that are empty in every line."""
    filled = {name for line in lines for name, text in line.items() if text} - {*left_out}
    names = [name for name in dict.fromkeys(chain.from_iterable(lines)) if name in filled]
    return [{name: line.get(name, "") for name in names} for line in lines]


def markdown(layout: Layout) -> str:
    """Caption, table and notes as Markdown."""
    caption, notes = (
        textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False)
        for sentences in (layout.caption, layout.notes)
    )
    return "\n\n".join(filter(None, [caption, grid(layout), notes]))


def grid(layout: Layout) -> str:
    """The table alone."""
    from tabulate import tabulate

    def safe(cell: str) -> str:
        return cell.replace("|", "\\|").replace("\n", " ")

    cells = {safe(name): [*map(safe, column)] for name, column in layout.columns.items()}
    align = ["right" if right else "left" for right in layout.numeric]
    text: str = tabulate(cells, "keys", "pipe", disable_numparse=True, colalign=align)
    return text
