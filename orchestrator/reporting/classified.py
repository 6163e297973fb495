"""Rows of classified images, their counts, and the formats in which they are written."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from air_core.bundle.files import UNSURE, true_classes
from air_core.tools.printable import printable
from orchestrator.files import make_folders, sync, temporary_for
from orchestrator.formatting import csv_cell
from orchestrator.reporting.notes import chance_caution

if TYPE_CHECKING:
    import pyarrow

    from air_core.bundle.classifier import Bundle

Row = dict[str, Any]  # by column; None where an image has no value
GROUP = 8192  # rows of a row group, which a reader of Parquet holds in memory
PATH_WIDTH = 44  # largest width of the printed table's first column
CONFUSIONS = 12  # that are printed


def classified_rows(bundle: Bundle, files: Sequence[Path], topk: int) -> Iterator[Row]:
    """`Bundle.rows`, with the true class as `true` if folders are named like classes."""
    true = true_classes(files, bundle.classnames)
    for row in bundle.rows(files, topk):
        yield row | {"true": true.get(Path(row["path"]))} if true else row


@dataclass
class Tally:
    """Counts of rows."""

    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)  # true and predicted class
    unsure: int = 0
    unreadable: list[str] = field(default_factory=list)  # reasons

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, which are counted when they are read."""
        for row in rows:
            if row["error"] is not None:
                self.unreadable.append(row["error"])
            elif row["class"] == UNSURE:
                self.unsure += 1
            elif row.get("true") is not None:
                self.pairs[row["true"], row["class"]] += 1
            yield row

    def confusion_lines(self, classnames: Sequence[str]) -> Iterator[str]:
        """Accuracy and most frequent confusions; nothing without images in class folders."""
        counts, total = self.pairs, self.pairs.total()
        if not total:
            return
        right = sum(count for (true, predicted), count in counts.items() if true == predicted)
        yield ""
        yield from filter(None, [chance_caution(right, total, len(classnames))])
        yield f"accuracy {right / total:.1%}: {right:,} of {total:,} images in class folders"
        wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]]
        if wrong:
            yield "most frequent confusions (folder -> predicted class)"
        for (true, predicted), count in wrong[:CONFUSIONS]:
            yield f"  {count:>5,}  {printable(true)} -> {printable(predicted)}"


# ---------------------------------------------------------------- formats


def check_file(file: Path) -> None:
    """Raises: ValueError, if `write_file` cannot write the file."""
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: the name must end in {' or '.join(SUFFIXES)}")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; remove it, or give another -o")


def write_file(file: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file, in the format of its suffix. Memory use is constant.

    A rename publishes the complete file; a process that is killed leaves none.
    """
    make_folders(file.absolute().parent)
    with temporary_for(file) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as handle:
            WRITERS[file.suffix[1:]](handle, rows)
        sync(temporary)
    sync(file.parent)


def text_lines(
    rows: Iterable[Row], files: Iterable[Path], classnames: Iterable[str]
) -> Iterator[str]:
    """A line for each readable image: its path, best class and other classes."""
    width = min(PATH_WIDTH, max(len(printable(str(file))) for file in files))
    name_width = max(map(len, classnames))
    for row in rows:
        if row["error"] is None:
            names, shares = (
                [row[name] for name in row if name.startswith(word)]
                for word in ("class", "probability")
            )
            guess = row.get("guess")
            first = f"{guess or names[0]:<{name_width}} {shares[0]:>6.1%}"
            pairs = zip(names[1:], shares[1:], strict=True)
            others = "   ".join(f"{name} {share:.1%}" for name, share in pairs)
            others += f"   {names[0]}" if guess else ""
            yield f"{printable(row['path']):<{width}}  {first}   {others}".rstrip()


def _write_json(handle: TextIO, rows: Iterable[Row]) -> None:
    """A list with one row per line."""
    for index, row in enumerate(rows):
        handle.write((",\n " if index else "[\n ") + json.dumps(row))
    handle.write("\n]\n")


def _write_csv(handle: TextIO, rows: Iterable[Row]) -> None:
    writer = csv.writer(handle, lineterminator="\n")
    for index, row in enumerate(rows):
        if index == 0:
            writer.writerow(row)
        writer.writerow(map(csv_cell, row.values()))


def _write_parquet(handle: TextIO, rows: Iterable[Row]) -> None:
    import pyarrow.parquet as pq

    rows = iter(rows)
    groups = iter(lambda: [*itertools.islice(rows, GROUP)], [])
    first = arrow_table(next(groups))
    with pq.ParquetWriter(handle.buffer, first.schema) as writer:
        writer.write_table(first)
        for group in groups:
            writer.write_table(arrow_table(group))


def arrow_table(rows: Sequence[Row]) -> pyarrow.Table:
    """At least one row as a table, whose columns always have the same types."""
    import pyarrow as pa

    types = {
        name: pa.float64() if name.startswith("probability") else pa.string() for name in rows[0]
    }
    texts = [{name: _valid_text(value) for name, value in row.items()} for row in rows]
    return pa.Table.from_pylist(texts, pa.schema(types))


def _valid_text(value: Any) -> Any:
    # Names of files can contain bytes that are no UTF-8; Python reads them as surrogates.
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


WRITERS: dict[str, Callable[[TextIO, Iterable[Row]], None]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "json": _write_json,
}
SUFFIXES = (".parquet", ".csv")
