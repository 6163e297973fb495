"""Text for terminals and CSV files. Commands print only through `show`."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TextIO

from air_core.tools.printable import printable
from orchestrator.environment import originals
from orchestrator.redact import redact


def show(text: object, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print a text with all control characters except line breaks escaped.

    Otherwise a file name could contain sequences that change a terminal's title or colours.

    Args:
        file: default: sys.stdout.
        end, flush: as for `print`.
    """
    if 2 in originals and file is sys.__stderr__:  # Ray starts, and stderr is redirected meanwhile
        os.write(originals[2], f"{printable_lines(str(text))}{end}".encode())
    else:
        print(printable_lines(str(text)), file=file, end=end, flush=flush)


def printable_lines(text: str) -> str:
    """The text with all control characters except line breaks escaped."""
    return "\n".join(map(printable, text.split("\n")))


def aligned(lines: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Lines of a table for a terminal; columns of numbers are right-aligned below their header.

    Args:
        width: maximal width; longer lines are wrapped within their cells. None: no limit.

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


def aligned_table(
    lines: Sequence[Mapping[str, str]], width: int, spare: Sequence[str] = ()
) -> list[str]:
    """Lines of a table for a terminal from its cells by column, below the names.

    Args:
        width: of a wider table the names are broken between their words.
        spare: columns that are then left out, in this order, until it fits.

    >>> print(*aligned_table([{"images_per_class": "60", "fused": "1"}], 14), sep="\\n")
    images_  fused
       per_
      class
         60      1
    """
    for count in range(len(spare) + 1):
        names = [name for name in lines[0] if name not in spare[:count]]
        cells = [[line[name] for name in names] for line in lines]
        longest = [max(map(len, column)) for column in zip(*cells, strict=True)]
        broken = [_broken(*pair) for pair in zip(names, longest, strict=True)]
        for heads in (names, broken):
            table = aligned([heads, *cells])
            if max(map(len, table)) <= width:
                return table
    return aligned([broken, *cells], width)


def _broken(name: str, width: int) -> str:
    """The words of a name in lines of the width, or of the longest word."""
    words, lines = re.findall(r"[^_. -]+[_. -]?", name), [""]
    width = max([width, *map(len, words)])
    for word in words:
        if len(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


_NUMBER = re.compile(r"[-+<\[* ]*\d[\d .,:±%\[\]+†‡↓e-]*")


def are_numbers(cells: Iterable[str]) -> bool:
    """Whether all non-empty cells are numbers, so that the column is right-aligned."""
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)


def relative_path(path: Path) -> str:
    """The path relative to the working directory if it is inside it, else unchanged."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


FORMULA = ("=", "+", "-", "@")  # a spreadsheet evaluates text that starts with one of these


def csv_cell(value: Any) -> Any:
    r"""A value for a CSV file: text stays on one line and is not a formula for a spreadsheet.

    >>> csv_cell("=1+1.jpg"), csv_cell("a\n.jpg"), csv_cell(-0.5)
    ("'=1+1.jpg", 'a\\u000a.jpg', -0.5)
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) else text


class Printable(logging.Filter):
    """Removes secrets from log records, and escapes control characters."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable_lines(redact(record.getMessage())), ()
        return True


def plural(number: int, noun: str) -> str:
    """
    >>> plural(1, "class"), plural(2, "class"), plural(2, "trial")
    ('1 class', '2 classes', '2 trials')
    """
    ending = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}" + ("" if number == 1 else ending)


def format_time(seconds: float) -> str:
    """Date and time, in the time zone of this machine, of seconds since the epoch."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def format_duration(seconds: float) -> str:
    """A duration in its two largest units.

    >>> format_duration(56), format_duration(67.4), format_duration(6980)
    ('56 s', '1 min 7 s', '1 h 56 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_rest} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_bytes(count: float) -> str:
    """A number of bytes with a unit.

    >>> format_bytes(0), format_bytes(1536), format_bytes(3 * 2**30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def format_interval(low: float, high: float) -> str:
    """Ends of an interval in percent.

    >>> format_interval(0.625, 0.7)
    '[62.5, 70.0]'
    """
    return f"[{format_percent(low)}, {format_percent(high)}]"


def format_value(value: Any) -> str:
    """A setting in the notation of a sweep file, floats with four digits.

    >>> format_value(0.30000000000000004), format_value(True), format_value(None)
    ('0.3', 'true', 'null')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(format_value, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def own_name(name: str) -> str:
    """The name of a dataset or model; of a path, that of the folder alone.

    >>> [own_name(name) for name in ("digits", "folder:/tmp/photos", "../sd15", "ViT-B-32/openai")]
    ['digits', 'photos', 'sd15', 'ViT-B-32/openai']
    """
    path = PurePath(name.removeprefix("folder:"))
    is_path = name.startswith(("folder:", "/", ".", "~"))
    return (is_path and path.name.strip(".")) or name
