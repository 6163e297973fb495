"""Tables of text cells as Markdown, CSV and LaTeX (booktabs)."""

from __future__ import annotations

import re
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

    frame: DataFrame  # of str; a MultiIndex of columns puts group headings above the names
    bold: frozenset[tuple[int, int]] = frozenset()  # (line, column)
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


def render(layout: Layout, format: str) -> str:
    return latex(layout) if format == "latex" else markdown(layout)


def markdown(layout: Layout) -> str:
    """Caption, table and notes as Markdown."""
    frame = layout.frame.map(_in_markdown)
    for line, column in layout.bold:
        frame.iat[line, column] = f"**{frame.iat[line, column]}**"
    names = [" ".join(name).strip() if isinstance(name, tuple) else name for name in frame.columns]
    frame.columns = [_in_markdown(name) for name in names]
    align = ["right" if right else "left" for right in layout.numeric]
    body = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    caption, notes = (
        textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False)
        for sentences in (layout.caption, layout.notes)
    )
    return "\n\n".join(filter(None, [caption, body, notes]))


def _in_markdown(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


WIDE = 92  # characters in a line that fill the width of a LaTeX page at normal size


def latex(layout: Layout) -> str:
    """A booktabs table, scaled down if it is wider than the page."""
    frame = layout.frame
    styles = frame.map(lambda cell: "")
    for line, column in layout.bold:
        styles.iat[line, column] = "textbf:--rwrap;"
    style = (
        frame.style.hide(axis="index")
        .format(escape_latex)
        .format_index(escape_latex, axis="columns")
    )
    text: str = style.apply(lambda _: styles, axis=None).to_latex(
        hrules=True,
        position_float="centering",
        multicol_align="c",
        column_format="".join("r" if right else "l" for right in layout.numeric),
        caption=escape_latex(" ".join([*layout.caption, *layout.notes])),
    )
    packages = r"% \usepackage[T1]{fontenc} \usepackage{booktabs}"
    lines = [[str(name) for name in frame.columns], *frame.to_numpy().tolist()]
    if max(sum(len(cell) + 3 for cell in line) for line in lines) > WIDE:
        packages += r" \usepackage{graphicx}"
        text = text.replace(r"\begin{tabular}", r"\resizebox{\textwidth}{!}{\begin{tabular}", 1)
        text = text.replace(r"\end{tabular}", r"\end{tabular}}", 1)
    return f"{packages}\n{text.rstrip()}"


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "[": "{[}",  # else LaTeX reads it as an option of the preceding line break
        "]": "{]}",
        "*": "{*}",
        "±": r"$\pm$",
        "\N{MULTIPLICATION SIGN}": r"$\times$",
        "\N{MINUS SIGN}": "$-$",
        "\N{EN DASH}": "--",
        "→": r"$\rightarrow$",
        "†": r"$^\dagger$",
        "‡": r"$^\ddagger$",
        "↓": r"$^\downarrow$",
        "\n": " ",
        "\t": " ",
    }
)


def escape_latex(text: str) -> str:
    """Escape text for LaTeX. Letters missing in its Latin fonts become code points.

    >>> print(escape_latex("zero_shot: -2.1 ± 0.3 %"))
    zero\\_shot: $-$2.1 $\\pm$ 0.3 \\%
    >>> print(escape_latex("digits -> 花"))
    digits $\\rightarrow$ {[}U+82B1{]}
    """
    text = text.replace("->", "→")
    text = re.sub(r"(?<![\w.\]-])-(?=\d)", "\N{MINUS SIGN}", text)  # 1e-3 keeps its hyphen
    text = re.sub(r"[^\0-\u017f±×−–→†‡↓]", lambda match: f"[U+{ord(match[0]):04X}]", text)  # noqa: RUF001
    return text.replace("--", "-\u200b-").translate({**_LATEX, 0x200B: "{}"})
