"""Parts of a dataset whose archive defines none: from split files, or by a fixed rule.

The rule uses no random numbers: it sorts the images of a class by a hash of their paths and holds
out the first ones. Parts therefore depend on file names only, not on the version of a library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from air_core.datasets.class_folders import class_files
from air_core.datasets.dataset import Listing, Row, listing
from air_core.datasets.places import read_lines, read_text

T = TypeVar("T")

VAL_SHARE = Fraction(1, 10)  # of the training part, if the source defines no validation part
SEED = "airsweep"  # another seed gives another split


@dataclass(frozen=True)
class SplitFiles:
    """The parts of the paths in split files. `rest` is the part of all other images."""

    parts: tuple[tuple[str, str], ...]  # (path, part)
    files: tuple[Path, ...]
    rest: str | None


def find_split(name: str, folders: Sequence[Path], coop: str | None = None) -> SplitFiles | None:
    """Find the split files of a dataset, in the first folder that contains any.

    `test.txt` is required. Without `train.txt` all images that no file names are for training. The
    names `<dataset>-test.txt` (TorchGeo) and `test.json` (ELEVATER, in COCO's format) work as well.

    Args:
        coop: name of CoOp's single file for all parts.
    """
    for folder in folders:
        found = {part: _split_file(name, folder, part) for part in ("train", "val", "test")}
        if found["test"] is not None:
            files = {part: file for part, file in found.items() if file is not None}
            return SplitFiles(
                tuple((path, part) for part, file in files.items() for path in _paths(name, file)),
                tuple(files.values()),
                rest=None if "train" in files else "train",
            )
        if coop is not None and (folder / coop).is_file():
            return SplitFiles(
                tuple(_from_json(name, folder / coop, _coop_rows, '{"train": [[PATH, ...]], ...}')),
                (folder / coop,),
                rest=None,
            )
    return None


def lists_listing(
    name: str,
    home: Path,
    lists: Mapping[str, Path],
    classnames: Sequence[str],
    read: Callable[[str], tuple[str, str]],
) -> Listing:
    """All images of a dataset that has a list of images for each part.

    Args:
        lists: by part; opens no other file.
        read: path and class name of the image in a line.

    Raises:
        ValueError: a list names an unknown class, or files are missing.
    """
    label = {classname: i for i, classname in enumerate(classnames)}
    rows = []
    for part, file in lists.items():
        for line in read_lines(name, file):
            path, classname = read(line)
            if classname not in label:
                raise ValueError(
                    f"{name}: {file} names {line!r}, but {classname!r} is none of "
                    f"{len(label)} classes"
                )
            rows.append(Row(path, label[classname], part))
    return listing(name, home, rows, classnames, beside=lists.values())


def split_listing(
    name: str,
    home: Path,
    folders: Sequence[str],
    classnames: Sequence[str],
    split: SplitFiles | None,
    test_share: Fraction,
) -> Listing:
    """All images of a dataset of class folders, with label and part; see `_split_rows`."""
    found = class_files(home, folders)
    on_disk = [f"{folder}/{file.name}" for folder, of in found.items() for file in of]
    return listing(
        name,
        home,
        _split_rows(name, on_disk, folders, split, test_share),
        classnames,
        beside=split.files if split else (),
    )


def _split_rows(
    name: str,
    on_disk: Iterable[str],
    folders: Sequence[str],
    split: SplitFiles | None,
    test_share: Fraction,
) -> list[Row]:
    """The rows of a dataset of class folders. A test image is never in another part.

    Args:
        on_disk: paths, `<folder>/<file>`.
        folders: class folders in the order of labels.
        test_share: of each class, without split files.

    Raises:
        ValueError: a split file names a folder that is not a class.
    """
    label = {folder: i for i, folder in enumerate(folders)}
    if split is None:
        paths = sorted(on_disk)
        test = held_out(paths, [label[_folder(path)] for path in paths], test_share)
        parts = [(path, "test" if path in test else "train") for path in paths]
    else:
        parts = list(split.parts)
        named = {path for path, _ in parts}
        if split.rest is not None:
            parts += [(path, split.rest) for path in sorted(on_disk) if path not in named]
        for path, part in parts:
            if _folder(path) not in label:
                raise ValueError(
                    f"{name}: the {part} list names {path}, but {_folder(path)!r} is not a "
                    f"class folder; expected <class>/<file> with a class of {', '.join(folders)}"
                )
    return with_validation(Row(path, label[_folder(path)], part) for path, part in parts)


def with_validation(rows: Iterable[Row]) -> list[Row]:
    """Turn a tenth of each class's training images into val, unless the dataset has a val part."""
    rows = list(rows)
    if any(row.part == "val" for row in rows):
        return rows
    train = [row for row in rows if row.part == "train"]
    chosen = held_out([row.path for row in train], [row.label for row in train], VAL_SHARE)
    return [row._replace(part="val") if row.path in chosen else row for row in rows]


def held_out(paths: Sequence[str], labels: Sequence[int], share: Fraction) -> set[str]:
    """Select a share of the paths, the same share of every class. The selection is deterministic.

    The total is the rounded share, and largest remainders distribute it over the classes. A class
    of two or more paths contributes at least one; no class contributes all its paths.
    """
    classes: dict[int, list[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        classes.setdefault(label, []).append(path)
    exact = {label: len(of) * share for label, of in sorted(classes.items())}
    counts = {label: int(wanted) for label, wanted in exact.items()}
    left = round(len(paths) * share) - sum(counts.values())
    for label in sorted(exact, key=lambda c: (counts[c] - exact[c], c))[:left]:
        counts[label] += 1
    return {
        path
        for label, of in classes.items()
        for path in sorted(of, key=_place)[: min(max(counts[label], 1), len(of) - 1)]
    }


def _place(path: str) -> tuple[bytes, str]:
    return blake2b(f"{SEED}/{path}".encode(), digest_size=8).digest(), path


def _folder(path: str) -> str:
    return path.split("/")[0]


def _split_file(name: str, folder: Path, part: str) -> Path | None:
    names = (f"{part}.txt", f"{name}-{part}.txt", f"{part}.json")
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _coop_rows(content: Any) -> list[tuple[str, str]]:
    return [(str(row[0]), part) for part in ("train", "val", "test") for row in content[part]]


def _coco_names(content: Any) -> list[str]:
    return [str(image["file_name"]) for image in content["images"]]


def _from_json(name: str, file: Path, read: Callable[[Any], list[T]], expected: str) -> list[T]:
    try:
        return read(json.loads(read_text(file)))
    except (json.JSONDecodeError, LookupError, TypeError, RecursionError) as problem:
        raise ValueError(
            f"{name}: {file} is no split file; expected JSON such as {expected}; get it again"
        ) from problem


def _paths(name: str, file: Path) -> list[str]:
    # A line is `[archive.zip@][<class>/]<class>_<number>.jpg [label]`.
    if file.suffix == ".json":
        names = _from_json(name, file, _coco_names, '{"images": [{"file_name": PATH}, ...]}')
    else:
        names = [line.split()[0] for line in read_text(file).splitlines() if line.strip()]
    bare = [name.rpartition("@")[2] for name in names]
    return [name if "/" in name else f"{name.rpartition('_')[0]}/{name}" for name in bare]
