"""Rows of classified images, and Parquet, CSV and JSON tables of them."""

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
from orchestrator.files import sync, temporary_for
from orchestrator.formatting import csv_cell, show

if TYPE_CHECKING:
    import pyarrow

    from air_core.bundle.classifier import Bundle

Row = dict[str, Any]  # by column; None where an image has no value
GROUP = 8192  # rows of a row group, which a reader of Parquet holds in memory


def classified_rows(bundle: Bundle, files: Sequence[Path], topk: int) -> Iterator[Row]:
    """`Bundle.rows`, with the true class as `true` if folders are named like classes."""
    true = true_classes(files, bundle.classnames)
    for row in bundle.rows(files, topk):
        yield row | {"true": true.get(Path(row["path"]))} if true else row


@dataclass
class Tally:
    """Counts of rows."""

    images: int = 0
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)  # true and predicted class
    unsure: int = 0
    unreadable: list[str] = field(default_factory=list)  # reasons

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, which are counted when they are read."""
        for row in rows:
            self.images += 1
            if row["error"] is not None:
                self.unreadable.append(row["error"])
            elif row["class"] == UNSURE:
                self.unsure += 1
            elif row.get("true") is not None:
                self.pairs[row["true"], row["class"]] += 1
            yield row


# ---------------------------------------------------------------- tables


def check_table(file: Path) -> None:
    """Raises: ValueError, if `write_table` cannot write the file."""
    if file.suffix not in WRITERS:
        raise ValueError(f"{file}: the name must end in {' or '.join(WRITERS)}")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; remove it, or give another -o")


def write_table(file: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file, in the format of its suffix. Memory use is constant.

    A rename publishes the complete file; a process that is killed leaves none.
    """
    with temporary_for(file) as temporary:
        WRITERS[file.suffix](temporary, iter(rows))
        sync(temporary)
    sync(file.parent)


def write_csv(handle: TextIO, rows: Iterable[Row]) -> None:
    writer = csv.writer(handle, lineterminator="\n")
    for index, row in enumerate(rows):
        if index == 0:
            writer.writerow(row)
        writer.writerow(map(csv_cell, row.values()))


def show_json(rows: Iterable[Row]) -> None:
    """Print a JSON list with one row per line."""
    for index, row in enumerate(rows):
        show(",\n " if index else "[\n ", end="")
        show(json.dumps(row), end="")
    show("\n]")


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


def _write_parquet(file: Path, rows: Iterator[Row]) -> None:
    import pyarrow.parquet as pq

    groups = iter(lambda: [*itertools.islice(rows, GROUP)], [])
    first = arrow_table(next(groups))
    with pq.ParquetWriter(file, first.schema) as writer:
        writer.write_table(first)
        for group in groups:
            writer.write_table(arrow_table(group))


def _write_csv(file: Path, rows: Iterator[Row]) -> None:
    with open(file, "w", encoding="utf-8", newline="") as handle:
        write_csv(handle, rows)


WRITERS: dict[str, Callable[[Path, Iterator[Row]], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
}
