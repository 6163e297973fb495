"""`folder:<path>` with a `classes.txt`: your images without class folders, few or none labelled.

    <path>/**/*.jpg         images in any folders; the names of the folders mean nothing
    <path>/classes.txt      one class per line: `name`, or `name = how to say it` for CLIP
    <path>/labels.csv       optional: columns `image` (path below the folder) and `class`, and
                            optionally `part`: test (default) or val; `number` is not read
    <path>/template.txt     optional, as for class folders; also `allow_duplicates`

Images without a label are the pool: part `train`, label UNKNOWN. Labelled images are never in it.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from air_core.datasets.class_folders import FEWEST, READ_TEXT, images_in, skipped_clause, walk
from air_core.datasets.dataset import Listing, Row, some
from air_core.datasets.places import class_entries, read_text, said, text_lines
from air_core.settings import UNKNOWN

CLASSES, LABELS = "classes.txt", "labels.csv"
COLUMNS = ("image", "class", "part")
PARTS = ("test", "val")


@dataclass(frozen=True)
class Classes:
    """Classes in label order: names as in `labels.csv`, and the class names that CLIP reads."""

    names: tuple[str, ...]
    classnames: tuple[str, ...]

    def text(self) -> str:
        """Content of a `classes.txt`."""
        pairs = zip(self.names, self.classnames, strict=True)
        lines = (name if said(name) == text else f"{name} = {text}" for name, text in pairs)
        return "".join(f"{line}\n" for line in lines)


def is_unlabelled(home: Path) -> bool:
    """Whether the images of a folder have no class folders, since it contains `classes.txt`."""
    return os.path.lexists(home / CLASSES)


def read_classes(file: Path) -> Classes:
    """The classes in a file such as `classes.txt`.

    Raises:
        ValueError: the file is missing, or see `parse_classes`.
    """
    if not os.path.lexists(file):
        raise ValueError(f"{file} does not exist; expected a text file with one class per line")
    return parse_classes(str(file), text_lines(file))


def parse_classes(source: str, entries: Iterable[tuple[str, str]]) -> Classes:
    """The classes in entries, see `class_entries`.

    Raises:
        ValueError: an entry is invalid, or there are fewer than two classes.
    """
    found = class_entries(entries)
    classnames = tuple(entry.classname for entry in found.values())
    if len(found) < 2:
        only = f"only one class, {classnames[0]!r}" if found else "no class"
        raise ValueError(f"{source} has {only}; a classifier needs two or more")
    return Classes(tuple(found), classnames)


# ---------------------------------------------------------------- images and labels


def unlabelled_listing(home: Path, classes: Classes) -> Listing:
    """All images below a folder, sorted by path, with the labels that are known.

    Raises:
        ValueError: there are too few images without a label, or `labels.csv` is invalid.
    """
    files = [file for folder, _ in walk(home) for file in images_in(folder)]
    paths = [file.relative_to(home).as_posix() for file in sorted(files)]
    if not paths:
        raise ValueError(
            f"{home} and its folders contain no images ({READ_TEXT})"
            f"{skipped_clause(home)}; put your images beside {CLASSES}, in any "
            "folders"
        )
    labels = read_labels(home, paths, classes)
    left, needed = len(paths) - len(labels), FEWEST * len(classes.names)
    if left < needed:
        raise ValueError(
            f"{home} has {left:,} images without a label for {len(classes.names)} classes, but "
            f"learning needs {FEWEST} for each class, {needed:,} in all{skipped_clause(home)}; add "
            "images, or name fewer classes; if most images are labelled, use class folders"
        )
    rows = [Row(path, *labels.get(path, (UNKNOWN, "train"))) for path in paths]
    beside = [home / name for name in (CLASSES, LABELS, "template.txt")]
    return Listing(home, tuple(rows), tuple(file for file in beside if file.is_file()))


def read_labels(home: Path, images: Iterable[str], classes: Classes) -> dict[str, tuple[int, str]]:
    """Label and part of the images in `labels.csv`, by path; empty if there is no such file.

    A line with an empty class is skipped, so a file can be filled in little by little. The first
    line may be repeated, so samples can be put together. The case of class names is free.

    Raises:
        ValueError: a line has an unknown image, class or part, or an image occurs twice.
    """
    file = home / LABELS
    if not os.path.lexists(file):
        return {}
    known = dict.fromkeys(images)
    label_of = {name: i for i, name in enumerate(classes.classnames)}
    label_of |= {name: i for i, name in enumerate(classes.names)}
    label_of = {name.lower(): i for name, i in label_of.items()} | label_of
    found: dict[str, tuple[int, str]] = {}
    for number, line in _lines(file):
        place = f"{file}:{number}"
        image, name, part = (line.get(column, "") for column in COLUMNS)
        image = PurePosixPath(image).as_posix()
        if image not in known:
            raise ValueError(
                f"{place}: {image!r} is not an image in {home}; expected a path below that folder, "
                f"such as {next(iter(known))!r}"
            )
        if not name:
            continue
        if image in found:
            raise ValueError(f"{place}: {image!r} has a line already; remove one")
        label = label_of.get(name, label_of.get(name.lower()))
        if label is None:
            close = get_close_matches(name.lower(), label_of, n=1)
            hint = f"did you mean {classes.names[label_of[close[0]]]!r}? " if close else ""
            raise ValueError(
                f"{place}: {name!r} is not a class; {hint}{CLASSES} has {some(classes.names, 10)}"
            )
        if part and part not in PARTS:
            raise ValueError(
                f"{place}: {part!r} is not a part; allowed: {', '.join(PARTS)}, or nothing for test"
            )
        found[image] = label, part or "test"
    return found


def listed_images(files: Iterable[Path]) -> set[str]:
    """The images in files such as `labels.csv`, with a class or without; other files have none."""
    found: set[str] = set()
    for file in files:
        with suppress(ValueError):
            found |= {line["image"] for _, line in _lines(file)}
    return found


def _lines(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of each line of a CSV file that is not empty."""
    rows = csv.reader(io.StringIO(read_text(file), newline=""))
    columns: list[str] = []
    for row in rows:
        cells = [cell.strip() for cell in row]
        header = [cell.lower() for cell in cells]
        if not any(cells) or header == columns:
            continue
        if not columns:
            columns = header
            if {*columns} - {*COLUMNS, "number"} or {*COLUMNS[:2]} - {*columns}:
                raise ValueError(
                    f"{file}:{rows.line_num}: the columns are {', '.join(cells)}; expected the "
                    "line `image,class` or `image,class,part` first"
                )
        elif len(cells) != len(columns):
            raise ValueError(
                f"{file}:{rows.line_num}: {len(cells)} cells, but the columns are "
                f"{', '.join(columns)}; quote a path that contains a comma"
            )
        else:
            yield rows.line_num, dict(zip(columns, cells, strict=True))
