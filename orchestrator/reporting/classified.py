"""Tables of classified images: their rows, and Parquet, CSV and JSON Lines files of them."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.bundle.files import UNSURE
from orchestrator.files import sync, temporary_for
from orchestrator.formatting import csv_cell

if TYPE_CHECKING:
    from air_core.bundle.classifier import Bundle, ClassifiedImage

Row = dict[str, Any]  # by column; None where an image has no value
PAIR = ("class", "probability")
GROUP = 8192  # rows of a row group, which a reader of Parquet holds in memory


def columns(classes: int, labelled: bool) -> tuple[str, ...]:
    """Columns of a table of classified images.

    Args:
        classes: number of classes of each image.
        labelled: whether folders name classes, so that there is a column `true`.
    """
    pairs = [f"{name}_{rank}" for rank in range(2, classes + 1) for name in PAIR]
    return ("image", *PAIR, *pairs, *(("true",) if labelled else ()), "error")


def values_of(result: ClassifiedImage) -> Row:
    """The columns image, class, probability, class_2, probability_2, ... of an image."""
    row: Row = {"image": result.image}
    for rank, (name, probability) in enumerate(result.top, start=1):
        suffix = "" if rank == 1 else f"_{rank}"
        row |= {f"class{suffix}": name, f"probability{suffix}": probability}
    return row | {"class": result.classname}  # may be `unsure`


def classified_rows(
    bundle: Bundle, files: Sequence[Path], true: Mapping[Path, str], names: Sequence[str]
) -> Iterator[Row]:
    """One row per file, in order; an unreadable file has the reason as `error`.

    Args:
        true: classes of files, for the column `true`.
        names: from `columns`.
    """
    unreadable: list[Row] = []  # before the next result
    empty: Row = dict.fromkeys(names)
    topk = sum(name.startswith("class") for name in names)

    def row(file: Path, **values: Any) -> Row:
        label = {"true": true.get(file)} if "true" in names else {}
        return empty | {"image": str(file)} | values | label

    def report(file: Path, reason: str) -> None:
        unreadable.append(row(file, error=reason))

    for result in bundle.stream(files, topk, report):
        yield from unreadable
        unreadable.clear()
        yield row(Path(result.image), **values_of(result))
    yield from unreadable


@dataclass
class Tally:
    """Counts of the rows of a table."""

    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)  # true and predicted class
    unsure: int = 0
    unreadable: list[str] = field(default_factory=list)  # reasons

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, which are counted when they are read."""
        for row in rows:
            if row["error"] is not None:
                self.unreadable.append(row["error"])
            else:
                self.count(row.get("true"), row["class"])
            yield row

    def count(self, true: str | None, predicted: str) -> None:
        if predicted == UNSURE:
            self.unsure += 1
        elif true is not None:
            self.pairs[true, predicted] += 1


# ---------------------------------------------------------------- files


def check_suffix(file: Path) -> None:
    """Raises: ValueError, if the suffix is not that of a table."""
    if file.suffix not in WRITERS:
        raise ValueError(f"{file}: the name must end in one of {', '.join(WRITERS)}")


def write_table(file: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows to a file, in the format of its suffix. Memory use is constant.

    A rename publishes the complete file; a process that is killed leaves none.
    """
    with temporary_for(file) as temporary:
        WRITERS[file.suffix](temporary, names, rows)
        sync(temporary)
    sync(file.parent)


def _write_parquet(file: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = pa.float64()
    schema = pa.schema(
        (name, number if name.startswith("probability") else pa.string()) for name in names
    )
    every = iter(rows)
    with pq.ParquetWriter(file, schema) as writer:
        while group := [*itertools.islice(every, GROUP)]:
            texts = [{name: _valid_text(value) for name, value in row.items()} for row in group]
            writer.write_table(pa.Table.from_pylist(texts, schema))


def _valid_text(value: Any) -> Any:
    # Names of files can contain bytes that are no UTF-8; Python reads them as surrogates.
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _write_csv(file: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    with open(file, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([csv_cell(row[name]) for name in names] for row in rows)


def _write_jsonl(file: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    with open(file, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)


WRITERS: dict[str, Callable[[Path, Sequence[str], Iterable[Row]], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
