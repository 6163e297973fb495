"""Tables for readers: Markdown, LaTeX (booktabs), a terminal. Knows cells, not what they mean."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table before it has a syntax."""

    header: list[str]
    numeric: list[bool]  # columns that are right-aligned
    lines: list[list[str]]
    bold: set[tuple[int, int]]  # (line, column)
    caption: list[str]  # sentences
    notes: list[str]  # sentences below the table
    groups: list[tuple[str, int]] = field(default_factory=list)  # (words, columns) above the header
    superscripts: str = ""  # characters that are small and high where there is a way


def filled(sentences: Sequence[str]) -> str:
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines for a terminal, each column as wide as its widest cell.

    >>> columns([("a", "state"), ("longer", "ok")])
    ['a       state', 'longer  ok']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


# ---------------------------------------------------------------- Markdown


def markdown(layout: Layout) -> str:
    """Caption, table and notes, each column as wide as its widest cell."""
    header, lines = _joined(layout), [list(line) for line in layout.lines]
    for line, column in layout.bold:
        text, marks = _parted(lines[line][column], layout.superscripts)
        lines[line][column] = f"**{text}**{marks}"
    header, *lines = ([_in_markdown(cell) for cell in line] for line in [header, *lines])
    widths = [max(3, *map(len, column)) for column in zip(header, *lines, strict=True)]

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
    body = "\n".join([padded(header), padded(rule), *map(padded, lines)])
    texts = [filled(layout.caption), body, *([filled(layout.notes)] if layout.notes else [])]
    return "\n\n".join(texts)


def _joined(layout: Layout) -> list[str]:
    """One header line, where there are two."""
    above = [words for words, columns in layout.groups for _ in range(columns)]
    if not above:
        return layout.header
    return [f"{up} {down}".strip() for up, down in zip(above, layout.header, strict=True)]


def _in_markdown(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _parted(cell: str, superscripts: str) -> tuple[str, str]:
    """A cell without the marks at its end, and those."""
    text = cell.rstrip(superscripts) if superscripts else cell
    return text, cell[len(text) :]


# ---------------------------------------------------------------- LaTeX

WIDE = 92  # characters of a line that fill the page at normal size


def latex(layout: Layout) -> str:
    """A booktabs table, in smaller letters or shrunk where it is wider than the page."""
    lines = []
    for i, line in enumerate(layout.lines):
        cells = []
        for j, cell in enumerate(line):
            text, marks = _parted(cell, layout.superscripts)
            shown = f"\\textbf{{{escaped(text)}}}" if (i, j) in layout.bold else escaped(text)
            cells.append(shown + (f"\\rlap{{{escaped(marks)}}}" if marks else ""))
        lines.append(f"{' & '.join(cells)} \\\\")
    columns = "".join("r" if right else "l" for right in layout.numeric)
    body = [
        f"\\begin{{tabular}}{{@{{}}{columns}@{{\\hspace{{0.6em}}}}}}",
        r"\toprule",
        *_above(layout),
        f"{' & '.join(escaped(name) for name in layout.header)} \\\\",
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    wide = max(sum(len(cell) + 3 for cell in line) for line in [layout.header, *layout.lines])
    if wide > WIDE:
        body = [r"\resizebox{\textwidth}{!}{" + body[0], *body[1:-1], body[-1] + "}"]
    return "\n".join(
        [
            r"% \usepackage{booktabs}" + (r" \usepackage{graphicx}" if wide > WIDE else ""),
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escaped(' '.join([*layout.caption, *layout.notes]))}}}",
            r"\smallskip",
            *body,
            r"\end{table}",
        ]
    )


def _above(layout: Layout) -> list[str]:
    if not layout.groups:
        return []
    cells, rules, at = [], [], 1
    for words, columns in layout.groups:
        cells.append(f"\\multicolumn{{{columns}}}{{c}}{{{escaped(words)}}}" if words else "")
        if words:
            rules.append(f"\\cmidrule(lr){{{at}-{at + columns - 1}}}")
        elif columns > 1:
            cells[-1] = " & " * (columns - 1)
        at += columns
    return [f"{' & '.join(cells)} \\\\", " ".join(rules)]


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",  # else an option of the line break before it
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "\u2212": "$-$",  # minus
    "\u2013": "--",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "↓": r"$^\downarrow$",
    "<": "$<$",
    ">": "$>$",
    "\n": " ",
    "\t": " ",
}


def escaped(text: str) -> str:
    """Text for LaTeX. Letters that its Latin fonts lack become their code points.

    >>> print(escaped("zero_shot: -2.1 ± 0.3 %"))
    zero\\_shot: $-$2.1 $\\pm$ 0.3 \\%
    >>> print(escaped("digits -> 花"))
    digits $\\rightarrow$ {[}U+82B1{]}
    """
    arrow, minus, apart = "\ue000", "\ue001", "\ue002"
    text = re.sub(r"-(?=-)", "-" + apart, text.replace("->", arrow))  # two hyphens stay two
    text = re.sub(r"(?<![\w.\]-])-(?=\d)", minus, text)  # a minus sign; 1e-3 keeps its hyphen
    known = {arrow: r"$\rightarrow$", minus: "$-$", apart: "{}", **_LATEX}
    return "".join(known.get(c) or (c if _latin(c) else _code_point(c)) for c in text)


_ACCENTS = {
    f"{mark:c}" for mark in (*range(0x300, 0x305), 0x306, 0x307, 0x308, 0x30A, 0x30B, 0x30C)
}
_ACCENTS |= {"\u0327"}  # cedilla; an ogonek is in no font that LaTeX takes by itself


def _latin(character: str) -> bool:
    """Has LaTeX a letter for it in every document, without a package?"""
    if " " <= character <= "~" or character in "ßæøåłœÆØÅŁŒ":
        return True
    letter, *accent = list(unicodedata.normalize("NFD", character))
    return character <= "\u017e" and letter.isascii() and len(accent) == 1 and accent[0] in _ACCENTS


def _code_point(character: str) -> str:
    return f"{{[}}U+{ord(character):04X}{{]}}"
