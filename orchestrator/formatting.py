"""Text for terminals and CSV files: all that commands print goes through `show`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from air_core.printable import printable


def show(text: object, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print a text, with control characters other than line breaks escaped.

    A file name may hold the sequence that changes a terminal's title or colours.

    Args:
        file: sys.stdout by default.
        end, flush: as `print` has them.
    """
    print(printable_lines(str(text)), file=file, end=end, flush=flush)


def printable_lines(text: str) -> str:
    """`printable`, with its line breaks kept."""
    return "\n".join(map(printable, text.split("\n")))


def aligned(lines: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Lines for a terminal, in columns; numbers below a first line stand right.

    Args:
        width: at most; cells are folded where a line would be longer. None: as wide as they are.

    >>> aligned([("a", "state"), ("longer", "ok")])
    ['a       state', 'longer  ok']
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _, *cells in zip(*lines, strict=True):
        table.add_column(justify="right" if are_numbers(cells) else "left")
    for line in lines:
        table.add_row(*line)
    console = Console(width=width or 10_000, color_system=None, markup=False, emoji=False)
    with console.capture() as text:
        console.print(table, highlight=False)
    return [line.rstrip() for line in text.get().splitlines()]


_NUMBER = re.compile(r"[-+<\[ ]*\d[\d .,:±%\[\]+†‡↓e-]*")


def are_numbers(cells: Iterable[str]) -> bool:
    """Are all of them numbers, but for empty ones? Such a column is right-aligned."""
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)


def near(path: Path) -> str:
    """A path as people would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


FORMULA = ("=", "+", "-", "@")  # a spreadsheet computes a text that begins so


def csv_cell(value: Any) -> Any:
    r"""A value for a CSV file: a text stays on one line, and is no formula to a spreadsheet.

    >>> csv_cell("=1+1.jpg"), csv_cell("a\n.jpg"), csv_cell(-0.5)
    ("'=1+1.jpg", 'a\\u000a.jpg', -0.5)
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) else text


class Printable(logging.Filter):
    """Escapes control characters in what a handler is about to write."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable_lines(record.getMessage()), ()
        return True


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def clock(seconds: float) -> str:
    """Minutes and seconds, hours where there are some.

    >>> clock(67.4), clock(3725)
    ('1:07', '1:02:05')
    """
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def size(count: float) -> str:
    """Bytes for people.

    >>> size(0), size(1536), size(3 * 2**30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def shown(value: Any) -> str:
    """A setting as a reader of the sweep file would write it.

    >>> shown(0.30000000000000004), shown(True), shown(None)
    ('0.3', 'true', 'null')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
