"""Tables of text cells as Markdown and CSV."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from orchestrator.formatting import are_numbers, csv_cell

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table with caption and notes, independent of the output format."""

    frame: DataFrame  # of str
    caption: Sequence[str] = ()  # sentences
    notes: Sequence[str] = ()  # sentences below the table

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers only and is right-aligned."""
        columns = (self.frame.iloc[:, i] for i in range(self.frame.shape[1]))
        return [are_numbers(column) for column in columns]


def drop_empty_columns(lines: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Lines of a table, without columns that are empty in every line.

    Screens use this instead of a DataFrame, because importing pandas takes half a second.
    """
    filled = {name for line in lines for name, text in line.items() if text}
    names = [name for name in dict.fromkeys(chain.from_iterable(lines)) if name in filled]
    return [{name: line.get(name, "") for name in names} for line in lines]


def csv_text(frame: DataFrame) -> str:
    """A frame as CSV without its index, with cells and names that spreadsheets do not evaluate."""
    from pandas import DataFrame

    # As objects: otherwise a column of integers with a missing value would become one of floats.
    cells = [[csv_cell(cell) for cell in line] for line in frame.astype(object).to_numpy()]
    safe = DataFrame(cells, columns=[csv_cell(name) for name in frame], dtype=object)
    text: str = safe.to_csv(index=False, lineterminator="\n")
    return text.rstrip("\n")


def markdown(layout: Layout) -> str:
    """Caption, table and notes as Markdown."""
    frame = layout.frame.map(_in_markdown)
    frame.columns = [_in_markdown(name) for name in frame.columns]
    align = ["right" if right else "left" for right in layout.numeric]
    body = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    caption, notes = (
        textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False)
        for sentences in (layout.caption, layout.notes)
    )
    return "\n\n".join(filter(None, [caption, body, notes]))


def _in_markdown(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
